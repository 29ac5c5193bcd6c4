package vault

import (
	"context"
	"fmt"
)

// Logout revokes the login token, and with it everything that was made with it: other tokens, and the broker's own
// logins. It is for a client that leaves nothing behind. A broker must not call it.
func (c *Client) Logout(ctx context.Context) error {
	n, err := c.loginToken(ctx)
	if err != nil {
		return err
	}
	_, err = c.do(ctx, call{method: "POST", path: "auth/token/revoke-accessor", token: n.token,
		body: map[string]string{"accessor": n.accessor}})
	if err != nil {
		return fmt.Errorf("logging out of vault: %w", err)
	}
	return nil
}
