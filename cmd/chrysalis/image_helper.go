package main

import (
	"context"
	"fmt"

	"chrysalis/image"
)

// ImageHelperCmd builds the GPU helper.
type ImageHelperCmd struct {
	sourceFlags
	Out string `short:"o" default:"out" placeholder:"DIR" help:"Where it goes (default: ${default})."`
}

// Run builds it and prints its SHA-256.
func (c *ImageHelperCmd) Run(ctx context.Context) error {
	show := newSteps()
	defer show.done()
	path, err := c.builder(ctx, c.Out, show).Helper(ctx)
	if err != nil {
		return err
	}
	show.done()
	sum, size, err := image.HashFile(path)
	if err != nil {
		return err
	}
	fmt.Printf("%s  %s  %d bytes\n", sum, path, size)
	return nil
}
