package launcher

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"

	"chrysalis/manifest"
)

// minToken is how long a token must be that TokenHashes reads, in bytes. A
// manifest is public, its hashes of tokens with it: what keeps a token secret is
// that nobody can guess it.
const minToken, maxToken = 32, 512

var tokenHashRE = regexp.MustCompile(`^[0-9a-f]{64}$`)

// TokenHashes returns what belongs into a manifest's Tokens: the given hashes and
// those of a file's tokens, one a line. Empty lines and lines that begin with '#'
// are left out. path may be empty.
func TokenHashes(hashes []string, path string) ([]string, error) {
	all := slices.Clone(hashes)
	for _, hash := range hashes {
		if !tokenHashRE.MatchString(hash) {
			return nil, fmt.Errorf("%.80q is not the SHA-256 of a token: 64 lower-case hexadecimal digits", hash)
		}
	}
	if path != "" {
		f, err := os.Open(path)
		if err != nil {
			return nil, fmt.Errorf("read the tokens: %w", err)
		}
		defer f.Close()
		lines := bufio.NewScanner(f)
		for n := 1; lines.Scan(); n++ {
			token := strings.TrimSpace(lines.Text())
			if token == "" || token[0] == '#' {
				continue
			}
			// Not the token itself: this ends in logs.
			if err := checkToken(token); err != nil {
				return nil, fmt.Errorf("%s, line %d: %w", path, n, err)
			}
			all = append(all, manifest.TokenHash(token))
		}
		if err := lines.Err(); err != nil {
			return nil, fmt.Errorf("read the tokens: %w", err)
		}
		if len(all) == len(hashes) {
			return nil, fmt.Errorf("%s has no token; an empty list would let everybody in", path)
		}
	}
	slices.Sort(all)
	return slices.Compact(all), nil
}

func checkToken(token string) error {
	if len(token) < minToken || len(token) > maxToken {
		return fmt.Errorf("a token of %d characters, expected %d to %d random ones; make one with 'openssl rand -hex 32'", len(token), minToken, maxToken)
	}
	for i := range len(token) {
		if c := token[i]; c <= ' ' || c > '~' {
			return errors.New("a token with other characters than printable ASCII")
		}
	}
	return nil
}
