package parts_test

import (
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"math"
	"testing"

	"github.com/pawlsec/pawl/cmd/parts"
	"golang.org/x/crypto/ssh"
)

func newSigner(t *testing.T) ssh.Signer {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatalf("making a key: %v", err)
	}
	signer, err := ssh.NewSignerFromKey(key)
	if err != nil {
		t.Fatalf("using a key: %v", err)
	}
	return signer
}

// certified returns a fresh key with a certificate for the principal, signed by the authority.
func certified(t *testing.T, authority ssh.Signer, principal string) ssh.Signer {
	t.Helper()
	signer := newSigner(t)
	certificate := &ssh.Certificate{
		Key:             signer.PublicKey(),
		CertType:        ssh.UserCert,
		ValidPrincipals: []string{principal},
		ValidBefore:     math.MaxInt64,
	}
	if err := certificate.SignCert(rand.Reader, authority); err != nil {
		t.Fatalf("signing: %v", err)
	}
	withCertificate, err := ssh.NewCertSigner(certificate, signer)
	if err != nil {
		t.Fatalf("using a certificate: %v", err)
	}
	return withCertificate
}

func login(server *parts.SSHDServer, as ssh.Signer) error {
	client, err := ssh.Dial("tcp", server.Address(), &ssh.ClientConfig{
		User:            "root",
		Auth:            []ssh.AuthMethod{ssh.PublicKeys(as)},
		HostKeyCallback: ssh.FixedHostKey(server.HostKey()),
	})
	if err != nil {
		return err
	}
	session, err := client.NewSession()
	if err == nil {
		err = session.Run("true")
	}
	return errors.Join(err, client.Close())
}

func TestSSHDAcceptsCertificatesOnly(t *testing.T) {
	authority := newSigner(t)
	server := parts.OwnSSHD(t, parts.SSHDConfig{
		UserCAKeys: ssh.MarshalAuthorizedKey(authority.PublicKey()),
		Principals: []string{"step"},
	})
	good := certified(t, authority, "step")
	if err := login(server, good); err != nil {
		t.Fatalf("login with a good certificate = %v, want nil\n%s", err, server.Log())
	}
	for name, signer := range map[string]ssh.Signer{
		"no certificate":    newSigner(t),
		"another authority": certified(t, newSigner(t), "step"),
		"another principal": certified(t, authority, "root"),
	} {
		if err := login(server, signer); err == nil {
			t.Errorf("login with %s is accepted", name)
		}
	}
	// A list of plain keys revokes the certificates over them too.
	if err := server.Revoke(ssh.MarshalAuthorizedKey(authority.PublicKey())); err != nil {
		t.Fatalf("Revoke() = %v, want nil", err)
	}
	if err := login(server, good); err == nil {
		t.Errorf("login under a revoked authority is accepted")
	}
	if err := server.Revoke(nil); err != nil {
		t.Fatalf("Revoke(nil) = %v, want nil", err)
	}
	if err := login(server, good); err != nil {
		t.Errorf("login after Revoke(nil) = %v, want nil", err)
	}
}
