package registry

import (
	"context"
	"time"

	"chrysalis/registry/lite"
)

// A Change is an entry that is not as it was. Before is nil for a new one.
type Change struct {
	Before *Entry    `json:"before"`
	After  Entry     `json:"after"`
	Time   time.Time `json:"time"` // of the block that it was seen in
}

// Watch reads a registry again and again, and calls changed for every entry that
// differs from before, first for all that there are; failed is called when it cannot
// be read. It ends with the context, or with the first error that a callback
// returns.
func (r *Reader) Watch(ctx context.Context, registry lite.Address, every time.Duration, changed func(Change) error, failed func(error) error) error {
	known := map[Key]Entry{}
	for {
		err := func() error {
			view, err := r.Client.Sync(ctx)
			if err != nil {
				return failed(err)
			}
			list, err := r.List(ctx, view, registry)
			if err != nil {
				return failed(err)
			}
			at := time.Unix(int64(view.Head.Time), 0).UTC()
			for _, e := range list {
				before, ok := known[e.Key]
				if ok && before == e {
					continue
				}
				known[e.Key] = e
				change := Change{After: e, Time: at}
				if ok {
					change.Before = &before
				}
				if err := changed(change); err != nil {
					return err
				}
			}
			return nil
		}()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(every):
		}
	}
}
