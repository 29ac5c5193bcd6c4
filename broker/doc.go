// Package broker holds the words of Pawl and the procedures over them: open a chain,
// delegate, issue a secret for one step, close it, report a violation, plan and carry out
// a revocation, and resume after a crash.
//
// It does no I/O and never reads the clock. What it needs of the world it asks for over the
// small ports declared beside their use: a [Ledger] that is the truth, a [Policy] that
// decides, a [Vault] that makes and ends tokens and secrets, and one [Backend] for each kind
// of target, which narrows, severs and proves.
//
// Three rules shape every procedure. Before an act that cannot be undone, the intent is
// committed. A secret is handed over only after a commit that found nothing fenced. An
// outcome that is not known is a state, which ends by proof or by time, never by hope.
package broker
