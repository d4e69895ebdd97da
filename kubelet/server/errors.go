package server

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"strings"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func writeJSON(w http.ResponseWriter, code int, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	w.Write(append(b, '\n'))
}

func errNoPath(path string) error {
	return &apierrors.StatusError{ErrStatus: metav1.Status{
		Status: metav1.StatusFailure, Code: http.StatusNotFound, Reason: metav1.StatusReasonNotFound,
		Message: "the local API has no " + path,
	}}
}

// StatusOf maps an error to the Kubernetes API's form: the only place that does.
func StatusOf(err error) metav1.Status {
	var api apierrors.APIStatus
	if errors.As(err, &api) {
		s := api.Status()
		s.TypeMeta = metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}
		return s
	}
	s := metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusFailure, Message: err.Error()}
	var tooLarge *http.MaxBytesError
	switch grpc := status.Code(err); {
	case errdefs.IsNotFound(err) || grpc == codes.NotFound:
		s.Code, s.Reason = http.StatusNotFound, metav1.StatusReasonNotFound
	case errdefs.IsInvalidArgument(err) || grpc == codes.InvalidArgument:
		s.Code, s.Reason = http.StatusBadRequest, metav1.StatusReasonBadRequest
	case errors.As(err, &tooLarge):
		s.Code, s.Reason = http.StatusRequestEntityTooLarge, metav1.StatusReasonRequestEntityTooLarge
	case errdefs.IsAlreadyExists(err) || grpc == codes.AlreadyExists:
		s.Code, s.Reason = http.StatusConflict, metav1.StatusReasonAlreadyExists
	case errdefs.IsFailedPrecondition(err) || errdefs.IsConflict(err) || grpc == codes.FailedPrecondition:
		s.Code, s.Reason = http.StatusConflict, metav1.StatusReasonConflict
	case errdefs.IsUnauthorized(err) || grpc == codes.Unauthenticated:
		// Not 401: that would be about the caller, who needs no login here.
		s.Code, s.Reason = http.StatusForbidden, metav1.StatusReasonForbidden
	case errdefs.IsUnavailable(err) || grpc == codes.Unavailable:
		s.Code, s.Reason = http.StatusServiceUnavailable, metav1.StatusReasonServiceUnavailable
	case errdefs.IsNotImplemented(err) || grpc == codes.Unimplemented:
		s.Code, s.Reason = http.StatusNotImplemented, metav1.StatusReasonMethodNotAllowed
	case errors.Is(err, context.DeadlineExceeded) || grpc == codes.DeadlineExceeded:
		s.Code, s.Reason = http.StatusGatewayTimeout, metav1.StatusReasonTimeout
	default:
		s.Code, s.Reason = http.StatusInternalServerError, metav1.StatusReasonInternalError
	}
	if st, ok := status.FromError(err); ok && st.Code() != codes.Unknown {
		s.Message = st.Message() // without "rpc error: code = …"
	}
	for _, kind := range []error{errdefs.ErrFailedPrecondition, errdefs.ErrUnavailable} { // the reason says it
		s.Message = strings.TrimSuffix(s.Message, ": "+kind.Error())
	}
	return s
}

func writeError(w http.ResponseWriter, err error) {
	s := StatusOf(err)
	writeJSON(w, int(s.Code), &s)
}
