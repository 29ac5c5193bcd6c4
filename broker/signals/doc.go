// Package signals takes security event tokens (RFC 8417) that others push (RFC 8935), and has the
// engine stop whom they are about; and it pushes such tokens to others, about what was stopped here.
//
// A token that comes is believed for its signature alone: by a key of a configured transmitter, with the one
// algorithm that the key has, for exactly our audience, once, and soon after it was made. Of the
// events, two of CAEP lead to something: session-revoked, and credential-change when it tells that
// a credential was revoked or deleted. One that was created or updated is taken note of and nothing
// follows, since identities rotate all the time.
//
// Which tokens came before is kept in memory. What followed from one is in the ledger under its name, and
// so it is not acted on again after a restart; one that nothing followed from may be, and then what it
// asks for was not there when it came first.
package signals
