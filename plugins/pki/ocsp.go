package pki

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"time"

	"golang.org/x/crypto/ocsp"
)

// askOCSP asks the engine's responder about one certificate. It returns an answer about a certificate of this authority
// alone, signed by the authority and valid now: the request has the authority's key and name, and the responder refuses
// other pairs.
func askOCSP(ctx context.Context, v Reader, mount string, by *x509.Certificate, serial string, now time.Time) (*ocsp.Response, error) {
	number := new(big.Int).SetBytes([]byte(serialBytes(serial)))
	request, err := ocsp.CreateRequest(&x509.Certificate{SerialNumber: number}, by, nil)
	if err != nil {
		return nil, fmt.Errorf("making an OCSP request: %w", err)
	}
	raw, err := v.OCSP(ctx, mount, request)
	if err != nil {
		return nil, err
	}
	answer, err := ocsp.ParseResponse(raw, by)
	switch {
	case err != nil:
		return nil, errors.New("the OCSP response is not valid")
	case answer.SerialNumber.Cmp(number) != 0:
		return nil, errors.New("the OCSP response is about another certificate")
	case !answer.NextUpdate.IsZero() && now.After(answer.NextUpdate):
		return nil, errors.New("the OCSP response has expired")
	}
	return answer, nil
}
