package manifests

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	v1 "k8s.io/api/core/v1"
)

// Check reads files and directories as a Source would and returns what is
// wrong with them and their warnings, and how many manifests it looked at. The
// error says that a path cannot be read at all.
func Check(paths ...string) (files int, problems []Problem, err error) {
	host, err := os.Hostname()
	if err != nil {
		return 0, nil, err
	}
	for _, path := range paths {
		s := New(Config{Dir: path, NodeName: host}, nil)
		if _, err := os.Stat(path); err != nil {
			return files, problems, err
		}
		names, err := s.list()
		if err != nil {
			return files, problems, err
		}
		slices.Sort(names)
		first := map[ObjectRef]object{}
		where := map[ObjectRef]string{}
		for _, name := range names {
			o := s.load(name, nil)
			files++
			problems = append(problems, o.problems...)
			for _, obj := range o.objects {
				ref := obj.ref()
				if _, taken := first[ref]; taken {
					problems = append(problems, Problem{File: filepath.Join(s.cfg.Dir, name), Document: obj.doc, Line: obj.line, Field: "metadata.name",
						Object: ref.String(), Message: fmt.Sprintf("%s is already defined in %s, and one of the two only can be in force", ref, where[ref]), Remedy: "give it another name or delete one"})
					continue
				}
				for _, w := range obj.warnings {
					w.File, w.Document, w.Object = filepath.Join(s.cfg.Dir, name), obj.doc, ref.String()
					problems = append(problems, w.Problem)
				}
				for _, p := range obj.references {
					p.File, p.Document = filepath.Join(s.cfg.Dir, name), obj.doc
					problems = append(problems, p)
				}
				first[ref], where[ref] = obj, name
			}
		}
	}
	return files, problems, nil
}

// ConfigMaps returns all that are in force, by namespace and name. The caller
// must not change them.
func (s *Source) ConfigMaps() []*v1.ConfigMap {
	var all []*v1.ConfigMap
	s.objects.each(func(o object) {
		if o.configMap != nil {
			all = append(all, o.configMap)
		}
	})
	slices.SortFunc(all, func(a, b *v1.ConfigMap) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	return all
}

// Secrets returns all that are in force, by namespace and name. The caller
// must not change them.
func (s *Source) Secrets() []*v1.Secret {
	var all []*v1.Secret
	s.objects.each(func(o object) {
		if o.secret != nil {
			all = append(all, o.secret)
		}
	})
	slices.SortFunc(all, func(a, b *v1.Secret) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	return all
}

func (s *objectStore) each(f func(object)) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, o := range s.have {
		f(o)
	}
}
