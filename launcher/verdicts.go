package launcher

// KVMVerdicts counts the images that KVM was seen to run, and those that it
// failed to run, since this machine booted.
func KVMVerdicts(stateDir string) (works, fails int) {
	for _, v := range (store{stateDir}).verdicts().KVM {
		switch v {
		case verdictWorks:
			works++
		case verdictFails:
			fails++
		}
	}
	return works, fails
}
