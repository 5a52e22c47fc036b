package provenance

import "testing"

// FuzzParseStatement reads a provenance statement of somebody else's build.
func FuzzParseStatement(f *testing.F) {
	f.Add([]byte(`{"_type":"` + statementType + `","subject":[],"predicateType":"` + predicateType + `","predicate":{"buildDefinition":{"buildType":"` + buildType + `","externalParameters":{},"resolvedDependencies":[]},"runDetails":{"builder":{"id":"` + builderID + `"}}}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if s, err := ParseStatement(data); err == nil {
			s.LockSHA256()
			s.Parameters()
		}
	})
}
