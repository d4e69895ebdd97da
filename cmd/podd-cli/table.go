package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/kubernetes/pkg/api/legacyscheme"
	_ "k8s.io/kubernetes/pkg/apis/core/install" // fills the scheme with the core group
	"k8s.io/kubernetes/pkg/printers"
	printersinternal "k8s.io/kubernetes/pkg/printers/internalversion"
)

// tables answers requests for tables, which kube-apiserver prints and podd does
// not: the columns come from upstream's printers, linked here and not into the
// daemon, where they would stay in memory.
type tables struct{ next http.RoundTripper }

func (t *tables) WrappedRoundTripper() http.RoundTripper { return t.next }

func (t *tables) RoundTrip(req *http.Request) (*http.Response, error) {
	if !strings.Contains(req.Header.Get("Accept"), "as=Table") {
		return t.next.RoundTrip(req)
	}
	q := req.URL.Query()
	include := metav1.IncludeObjectPolicy(q.Get("includeObject"))
	watching := q.Get("watch") == "true" || q.Get("watch") == "1"
	req = req.Clone(req.Context())
	req.Header.Set("Accept", "application/json")
	resp, err := t.next.RoundTrip(req)
	if err != nil || resp.StatusCode != http.StatusOK {
		return resp, err
	}
	resp.Header.Del("Content-Length")
	resp.ContentLength = -1
	if watching {
		resp.Body = watchTables(resp.Body, include)
		return resp, nil
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	table, err := toTable(body, include, false)
	if err != nil {
		return nil, err
	}
	out, err := json.Marshal(table)
	if err != nil {
		return nil, err
	}
	resp.Body = io.NopCloser(bytes.NewReader(out))
	resp.ContentLength = int64(len(out))
	return resp, nil
}

// watchTables turns each object of a watch into a table of one row; the
// columns come with the first one.
func watchTables(body io.ReadCloser, include metav1.IncludeObjectPolicy) io.ReadCloser {
	r, w := io.Pipe()
	go func() {
		dec, enc, first := json.NewDecoder(body), json.NewEncoder(w), true
		for {
			var ev struct {
				Type   string          `json:"type"`
				Object json.RawMessage `json:"object"`
			}
			if err := dec.Decode(&ev); err != nil {
				w.CloseWithError(err)
				return
			}
			if ev.Type != "ERROR" && ev.Type != "BOOKMARK" {
				table, err := toTable(ev.Object, include, !first)
				if err == nil {
					ev.Object, err = json.Marshal(table)
				}
				if err != nil {
					w.CloseWithError(err)
					return
				}
				first = false
			}
			if err := enc.Encode(&ev); err != nil {
				return // nobody reads any more
			}
		}
	}()
	return &pipeBody{r, body}
}

type pipeBody struct {
	*io.PipeReader
	body io.Closer
}

func (p *pipeBody) Close() error { return errors.Join(p.body.Close(), p.PipeReader.Close()) }

var generator = sync.OnceValue(func() *printers.HumanReadableGenerator {
	return printers.NewTableGenerator().With(printersinternal.AddHandlers)
})

// toTable prints one object or list as kube-apiserver does.
func toTable(text []byte, include metav1.IncludeObjectPolicy, noHeaders bool) (*metav1.Table, error) {
	obj, err := runtime.Decode(legacyscheme.Codecs.UniversalDecoder(schema.GroupVersion{Version: runtime.APIVersionInternal}), text)
	if err != nil {
		return nil, fmt.Errorf("decode the daemon's answer: %w", err)
	}
	table, err := generator().GenerateTable(obj, printers.GenerateOptions{Wide: true, NoHeaders: noHeaders})
	if err != nil {
		return nil, err
	}
	table.TypeMeta = metav1.TypeMeta{Kind: "Table", APIVersion: metav1.SchemeGroupVersion.String()}
	for i := range table.Rows {
		row := &table.Rows[i]
		switch include {
		case metav1.IncludeNone:
			row.Object.Object = nil
		case metav1.IncludeObject:
			row.Object.Object, err = legacyscheme.Scheme.ConvertToVersion(row.Object.Object, schema.GroupVersion{Version: "v1"})
			if err != nil {
				return nil, err
			}
		default:
			m, err := meta.Accessor(row.Object.Object)
			if err != nil {
				return nil, err
			}
			partial := meta.AsPartialObjectMetadata(m)
			partial.GetObjectKind().SetGroupVersionKind(metav1.SchemeGroupVersion.WithKind("PartialObjectMetadata"))
			row.Object.Object = partial
		}
		if row.Object.Object != nil {
			raw, err := json.Marshal(row.Object.Object)
			if err != nil {
				return nil, err
			}
			row.Object.Raw = raw
		}
	}
	return table, nil
}
