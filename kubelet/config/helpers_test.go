package config

import (
	"bytes"
	"encoding/json"

	kubeletv1beta1 "k8s.io/kubelet/config/v1beta1"
)

func kubeletInto() any { return &kubeletv1beta1.KubeletConfiguration{} }

func decodeStrict(s settings, into any) error {
	raw, err := json.Marshal(s)
	if err != nil {
		return err
	}
	d := json.NewDecoder(bytes.NewReader(raw))
	d.DisallowUnknownFields()
	return d.Decode(into)
}
