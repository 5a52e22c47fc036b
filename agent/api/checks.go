package api

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// check reports what is wrong with a field's value, as an invalid.
type check func(raw []byte) error

// invalid says what is wrong with a value and where inside the field it is.
// Neither part holds anything of the request but field names.
type invalid struct{ path, reason string }

func (e invalid) Error() string { return e.path + " " + e.reason }

// inside puts a place in front of an invalid's path.
func inside(place string, err error) error {
	if bad, ok := err.(invalid); ok {
		return invalid{place + bad.path, bad.reason}
	}
	return err
}

func want(ok bool, reason string) error {
	if ok {
		return nil
	}
	return invalid{reason: reason}
}

func boolean(raw []byte) error { return want(isBool(raw), "must be true or false") }

func integer(low, high int64) check {
	reason := fmt.Sprintf("must be an integer from %d to %d", low, high)
	return func(raw []byte) error {
		n, err := strconv.ParseInt(string(raw[:min(len(raw), 32)]), 10, 64)
		return want(err == nil && n >= low && n <= high, reason)
	}
}

func number(low, high float64) check {
	reason := fmt.Sprintf("must be a number from %g to %g", low, high)
	return func(raw []byte) error {
		// ParseFloat also takes "inf" and "nan", but those are not JSON.
		f, err := strconv.ParseFloat(string(raw[:min(len(raw), 64)]), 64)
		return want(err == nil && len(raw) <= 64 && f >= low && f <= high, reason)
	}
}

// text is a string of at most limit bytes as it is written; 0 is no limit of its
// own.
func text(limit int) check {
	reason := "must be a string"
	if limit > 0 {
		reason += fmt.Sprintf(" of at most %d bytes", limit)
	}
	return func(raw []byte) error {
		return want(isString(raw) && (limit == 0 || len(raw) <= limit+len(`""`)), reason)
	}
}

func oneOf(values ...string) check {
	reason := `must be "` + strings.Join(values, `" or "`) + `"`
	return func(raw []byte) error {
		return want(isString(raw) && len(raw) <= maxKey && slices.Contains(values, unquote(raw)), reason)
	}
}

func nullOr(c check) check {
	return func(raw []byte) error {
		if isNull(raw) {
			return nil
		}
		return c(raw)
	}
}

// listOf is an array of low to high elements.
func listOf(low, high int, element check) check {
	reason := fmt.Sprintf("must be an array of %d to %d elements", low, high)
	return func(raw []byte) error {
		if !isArray(raw) {
			return invalid{reason: reason}
		}
		n := 0
		err := elements(raw, func(i int, value []byte) error {
			if n++; n > high {
				return invalid{reason: reason}
			}
			return inside("["+strconv.Itoa(i)+"]", element(value))
		})
		if err == nil && n < low {
			return invalid{reason: reason}
		}
		return err
	}
}

// either picks a check by what kind of value there is.
func either(pick func(raw []byte) bool, yes, no check) check {
	return func(raw []byte) error {
		if pick(raw) {
			return yes(raw)
		}
		return no(raw)
	}
}

// object is an object with the given members and no others, each at most once.
func object(required []string, fields map[string]check) check {
	return func(raw []byte) error {
		if !isObject(raw) {
			return invalid{reason: "must be an object"}
		}
		seen := make([]string, 0, len(fields))
		err := members(raw, func(key string, value []byte) error {
			c, ok := fields[key]
			switch {
			case !ok:
				return invalid{"." + key, "is not supported"}
			case slices.Contains(seen, key):
				return invalid{"." + key, "is there twice"}
			}
			seen = append(seen, key)
			return inside("."+key, c(value))
		})
		if err != nil {
			return err
		}
		for _, key := range required {
			if !slices.Contains(seen, key) {
				return invalid{"." + key, "is missing"}
			}
		}
		return nil
	}
}

// schema is JSON that the agent does not look into, such as a tool's JSON Schema.
// The engine compiles it into a grammar at a cost that grows with both bounds.
func schema(raw []byte) error {
	const maxBytes, maxLevels = 256 << 10, 32
	if len(raw) > maxBytes {
		return invalid{reason: fmt.Sprintf("must be at most %d bytes of JSON", maxBytes)}
	}
	if depth(raw) > maxLevels {
		return invalid{reason: fmt.Sprintf("must be nested at most %d levels deep", maxLevels)}
	}
	return nil
}

// schemaOf is schema with a kind of value that it must be.
func schemaOf(kind func(raw []byte) bool, reason string) check {
	return func(raw []byte) error {
		if !kind(raw) {
			return invalid{reason: reason}
		}
		return schema(raw)
	}
}

// logitBias maps tokens' numbers to a bias.
func logitBias(raw []byte) error {
	const limit = 1024
	if !isObject(raw) {
		return invalid{reason: "must be an object"}
	}
	n := 0
	bias := number(-100, 100)
	return members(raw, func(token string, value []byte) error {
		if n++; n > limit {
			return invalid{reason: fmt.Sprintf("must have at most %d members", limit)}
		}
		if _, err := strconv.ParseUint(token, 10, 31); err != nil {
			return invalid{reason: "must have tokens' numbers as its keys"}
		}
		return inside("."+token, bias(value))
	})
}
