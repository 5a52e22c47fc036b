# The commands that a person needs; each sets up what it needs itself.
#
#   make demo    from nothing to a paid answer out of a VM
#   make test    every test, those in real VMs included
#   make image   the UKI, the disks and their manifest, in out/
#   make release the same, and their hashes, in release.json, to be committed
#   make repro   two builds in different conditions, compared bit for bit
#   make contract the contracts' code, from their source
#   make bench   the figures of docs/performance.md
#   make market-sim  the market simulated: pictures and tables of docs/market.md
#   make soak    what takes hours: load and attacks, faults at every call, defences
#                taken out, long fuzzing
#   make gpu-smoke  the GPU helper's read-only calls on this machine's own GPUs
#   make lint    formatting, vet and static checks
#   make clean   what make made in this folder; caches stay

# Mirrors to fetch Debian packages from, instead of the host's own.
MIRROR ?=
mirrors = $(foreach m,$(MIRROR),--mirror $(m))

chrysalis = bin/chrysalis

.PHONY: demo test test-images soak image release repro contract bench market-sim gpu-smoke lint clean deps test-deps

deps:
	@ci/install-deps build

test-deps:
	@ci/install-deps build test repro

# Go decides what is up to date.
.PHONY: $(chrysalis)
$(chrysalis): deps
	@CGO_ENABLED=0 go build -trimpath -o $@ ./cmd/chrysalis

image: $(chrysalis)
	@$(chrysalis) image build $(mirrors)

# What only tests boot.
test-images: image
	@$(chrysalis) image build --profile debug --image-only $(mirrors) >/dev/null
	@$(chrysalis) image build --profile gputest --image-only $(mirrors) >/dev/null

release: $(chrysalis)
	@$(chrysalis) image build $(mirrors)
	@$(chrysalis) image release

demo: image
	@ci/demo

test: test-deps test-images
	@ci/test

# The fuzzing goes on where it was interrupted; out/fuzz.json says what is done.
soak: test-deps test-images
	@go run ./ci/soak
	@CHRYSALIS_REQUIRE_VM=1 CHRYSALIS_SOAK=10m go test -count=1 -v -timeout 40m -run 'Test(Crowd|PredictedDisk)$$' ./ci/vmtest
	@CHRYSALIS_FAULT_POINTS=200 CHRYSALIS_REQUIRE_VM=1 go test -count=1 -timeout 3h -v ./ci/fault
	@go run ./ci/mutate
	@go run ./ci/fuzz -state out/fuzz.json 300

contract: test-deps
	@ci/contract write

repro:
	@ci/install-deps build repro
	@ci/repro

bench: image
	@$(chrysalis) image build --profile bench --image-only $(mirrors) >/dev/null
	@go run ./ci/bench

market-sim: deps
	@go run ./ci/market

gpu-smoke: test-deps
	@ci/gpu-smoke

lint: deps
	@ci/lint

clean:
	rm -rf bin out
