package workload

import (
	"context"
	"slices"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	pb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
)

// api serves one socket. For a profile of the Workload API that it lacks (WIT-SVID) it returns Unimplemented, as the
// standard requires.
type api struct {
	pb.UnimplementedSpiffeWorkloadAPIServer
	server   *Server
	identify func(context.Context) []spiffeid.ID
}

func always(id spiffeid.ID) func(context.Context) []spiffeid.ID {
	return func(context.Context) []spiffeid.ID { return []spiffeid.ID{id} }
}

// peerIDs calls Config.Identify with the process that connected, as the kernel reports it.
func (s *Server) peerIDs(ctx context.Context) []spiffeid.ID {
	if p, ok := peer.FromContext(ctx); ok {
		if info, ok := p.AuthInfo.(peerInfo); ok {
			return s.identify(info.Peer)
		}
	}
	return nil
}

// requireHeader rejects requests without the security header, as a defence against request forgery (SPIFFE Workload
// Endpoint, section 6.1).
func requireHeader(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	if err := checkHeader(ctx); err != nil {
		return nil, err
	}
	return next(ctx, req)
}

func requireHeaderOfStream(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	if err := checkHeader(ss.Context()); err != nil {
		return err
	}
	return next(srv, ss)
}

func checkHeader(ctx context.Context) error {
	if !slices.Equal(metadata.ValueFromIncomingContext(ctx, "workload.spiffe.io"), []string{"true"}) {
		return status.Error(codes.InvalidArgument, "security header missing from request")
	}
	return nil
}

func (a api) ids(ctx context.Context) ([]spiffeid.ID, error) {
	ids := a.identify(ctx)
	if len(ids) == 0 {
		return nil, status.Error(codes.PermissionDenied, "no identity issued")
	}
	return ids, nil
}

// push sends now, after every rotation, and at half of an SVID's lifetime, until the client disconnects.
func (a api) push(ctx context.Context, send func([]spiffeid.ID) error) error {
	for {
		changed := a.server.wait() // before sending: a rotation in between is not missed
		ids, err := a.ids(ctx)
		if err != nil {
			return err
		}
		if err := send(ids); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		case <-changed:
		case <-time.After(a.server.ttl / 2):
		}
	}
}

// FetchX509SVID streams the caller's SVIDs, each with the bundle of its trust domain.
func (a api) FetchX509SVID(_ *pb.X509SVIDRequest, stream grpc.ServerStreamingServer[pb.X509SVIDResponse]) error {
	return a.push(stream.Context(), func(ids []spiffeid.ID) error {
		bundle, resp := a.bundleDER(), new(pb.X509SVIDResponse)
		for _, id := range ids {
			svid, err := a.server.X509SVID(id)
			if err != nil {
				return status.Error(codes.Internal, err.Error())
			}
			certs, key, err := svid.MarshalRaw()
			if err != nil {
				return status.Error(codes.Internal, err.Error())
			}
			resp.Svids = append(resp.Svids, &pb.X509SVID{SpiffeId: id.String(), X509Svid: certs, X509SvidKey: key, Bundle: bundle})
		}
		return stream.Send(resp)
	})
}

// FetchX509Bundles streams the X.509 authorities.
func (a api) FetchX509Bundles(_ *pb.X509BundlesRequest, stream grpc.ServerStreamingServer[pb.X509BundlesResponse]) error {
	return a.push(stream.Context(), func([]spiffeid.ID) error {
		return stream.Send(&pb.X509BundlesResponse{Bundles: map[string][]byte{a.server.td.IDString(): a.bundleDER()}})
	})
}

// FetchJWTBundles streams the JWT authorities.
func (a api) FetchJWTBundles(_ *pb.JWTBundlesRequest, stream grpc.ServerStreamingServer[pb.JWTBundlesResponse]) error {
	return a.push(stream.Context(), func([]spiffeid.ID) error {
		jwks, err := a.server.Bundle().JWTBundle().Marshal()
		if err != nil {
			return status.Error(codes.Internal, err.Error())
		}
		return stream.Send(&pb.JWTBundlesResponse{Bundles: map[string][]byte{a.server.td.IDString(): jwks}})
	})
}

func (a api) bundleDER() []byte {
	der := [][]byte{}
	for _, cert := range a.server.Bundle().X509Authorities() {
		der = append(der, cert.Raw)
	}
	return slices.Concat(der...)
}

// FetchJWTSVID signs a JWT-SVID for each of the caller's identities, or for the requested one.
func (a api) FetchJWTSVID(ctx context.Context, req *pb.JWTSVIDRequest) (*pb.JWTSVIDResponse, error) {
	if len(req.Audience) == 0 || slices.Contains(req.Audience, "") {
		return nil, status.Error(codes.InvalidArgument, "audience must be specified")
	}
	ids, err := a.ids(ctx)
	if err != nil {
		return nil, err
	}
	resp := new(pb.JWTSVIDResponse)
	for _, id := range ids {
		if req.SpiffeId != "" && req.SpiffeId != id.String() {
			continue
		}
		token, err := a.server.JWTSVID(id, req.Audience...)
		if err != nil {
			return nil, status.Error(codes.Internal, err.Error())
		}
		resp.Svids = append(resp.Svids, &pb.JWTSVID{SpiffeId: id.String(), Svid: token})
	}
	if len(resp.Svids) == 0 {
		return nil, status.Error(codes.PermissionDenied, "no identity issued")
	}
	return resp, nil
}

// ValidateJWTSVID validates a JWT-SVID of this server for an audience.
func (a api) ValidateJWTSVID(ctx context.Context, req *pb.ValidateJWTSVIDRequest) (*pb.ValidateJWTSVIDResponse, error) {
	if req.Audience == "" {
		return nil, status.Error(codes.InvalidArgument, "audience must be specified")
	}
	if _, err := a.ids(ctx); err != nil {
		return nil, err
	}
	refused := status.Error(codes.InvalidArgument, "the JWT-SVID is not valid") // no detail: it would be an oracle
	token, err := jwt.ParseSigned(req.Svid, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		return nil, refused
	}
	key, ok := a.server.Bundle().FindJWTAuthority(token.Headers[0].KeyID)
	if !ok {
		return nil, refused
	}
	var claims jwt.Claims
	all := map[string]any{}
	if err := token.Claims(key, &claims, &all); err != nil {
		return nil, refused
	}
	expected := jwt.Expected{AnyAudience: jwt.Audience{req.Audience}, Time: a.server.now()}
	if claims.Expiry == nil || claims.ValidateWithLeeway(expected, 0) != nil {
		return nil, refused
	}
	fields, err := structpb.NewStruct(all)
	if err != nil {
		return nil, refused
	}
	return &pb.ValidateJWTSVIDResponse{SpiffeId: claims.Subject, Claims: fields}, nil
}
