package cluster

import "testing"

func TestControlPlane(t *testing.T) {
	p := plane(t)
	v, err := p.Client.Discovery().ServerVersion()
	if err != nil {
		t.Fatal(err)
	}
	if v.GitVersion != "v1.36.3" {
		t.Errorf("the apiserver is %s", v.GitVersion)
	}
	if _, err := p.BootstrapToken(t.Context()); err != nil {
		t.Error(err)
	}
	mark, err := p.Mark()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Client.Discovery().ServerVersion(); err != nil {
		t.Fatal(err)
	}
	if r, err := p.Requests("kubernetes-admin", mark); err != nil || r.Total() == 0 {
		t.Errorf("requests since the mark: %v, %v", r, err)
	}
}
