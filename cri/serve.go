package cri

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime/debug"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// maxMessage bounds a request and an answer, as the kubelet's client does.
const maxMessage = 16 << 20

// stopTime is how long running requests may take to end when serving stops.
// Event streams do not end by themselves.
const stopTime = time.Second

// Serve answers CRI clients on l until ctx ends, then waits for the running
// requests, at most stopTime. It closes l.
func Serve(ctx context.Context, l net.Listener, s *Service) error {
	srv := grpc.NewServer(
		grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage),
		grpc.UnaryInterceptor(s.unary), grpc.StreamInterceptor(s.streaming),
	)
	runtimeapi.RegisterRuntimeServiceServer(srv, s)
	runtimeapi.RegisterImageServiceServer(srv, s)
	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(l) }()
	select {
	case err := <-failed:
		return fmt.Errorf("serve CRI: %w", err)
	case <-ctx.Done():
	}
	stopped := make(chan struct{})
	go func() {
		srv.GracefulStop()
		close(stopped)
	}()
	wait, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTime)
	defer cancel()
	select {
	case <-stopped:
	case <-wait.Done():
		srv.Stop()
		<-stopped
	}
	<-failed
	return nil
}

// unary maps errors to gRPC codes at the edge, and keeps a panic in one
// request from ending the node's agent.
func (s *Service) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (resp any, err error) {
	defer func() {
		if p := recover(); p != nil {
			s.log.Error("panic in a CRI request", "method", info.FullMethod, "panic", p, "stack", string(debug.Stack()))
			err = fmt.Errorf("%s: internal error: %w", info.FullMethod, errdefs.ErrInternal)
		}
		if err != nil {
			s.log.Debug("CRI request failed", "method", info.FullMethod, "error", err)
			err = toGRPC(err)
		}
	}()
	return next(ctx, req)
}

func (s *Service) streaming(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) (err error) {
	defer func() {
		if p := recover(); p != nil {
			s.log.Error("panic in a CRI request", "method", info.FullMethod, "panic", p, "stack", string(debug.Stack()))
			err = fmt.Errorf("%s: internal error: %w", info.FullMethod, errdefs.ErrInternal)
		}
		if err != nil {
			err = toGRPC(err)
		}
	}()
	return next(srv, stream)
}

// toGRPC gives an error its code. What carries one already keeps it.
func toGRPC(err error) error {
	if _, ok := status.FromError(err); ok {
		return err
	}
	var coded interface{ GRPCStatus() *status.Status }
	if errors.As(err, &coded) {
		return status.Error(coded.GRPCStatus().Code(), err.Error())
	}
	return errgrpc.ToGRPC(err)
}
