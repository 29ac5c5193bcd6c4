# The entry points for people and for .ci/run. They need Go, git and make. `make test` ends with a list of the tests that
# were skipped, and of the program that each lacked.
# PAWL_REQUIRE=all makes that a failure, or some of
# vault,spire,postgres,sshd,python,nginx,apache2,haproxy,openssl,pgbouncer,pgpool.

GO       ?= go
PACKAGES ?= ./...
TIMEOUT  ?= 40m
FUZZTIME ?= 3s

STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
GOVULNCHECK := golang.org/x/vuln/cmd/govulncheck@v1.9.0

# The race detector needs a C compiler; without one the tests run without it.
RACE := $(shell [ "$$($(GO) env CGO_ENABLED)" = 1 ] && echo -race)

.PHONY: build parts test demo bench chaos power fuzz lint vuln clean

build: ## build/pawl
	$(GO) build -o build/pawl ./cmd/pawl

parts: ## the real Vault and SPIRE that tests run, about ten minutes once
	$(GO) run ./cmd/parts/build

test: parts
	$(GO) vet $(PACKAGES)
	$(GO) run ./cmd/parts/gotest $(RACE) -count=1 -timeout $(TIMEOUT) $(PACKAGES)

demo: parts build ## the main job on real parts, half a minute
	build/pawl demo

# QUICK=1 holds the ratios to their bounds and leaves docs/ alone. AGAINST=COMMIT runs that commit in turns with this
# tree, a quick run each; ONLY is a regular expression of the sections.
bench: parts ## Pawl beside Vault, measured; QUICK=1: in under three minutes, with the gate; FULL=1: with an hour under load; AGAINST=COMMIT: in turns with it
	$(GO) run ./cmd/bench $(if $(AGAINST),-against $(AGAINST) -quick,$(if $(QUICK),-quick -gate -page=false,$(if $(FULL),-soak 1h))) \
		$(if $(ONLY),-only '$(ONLY)')

chaos: parts ## every mishap at every point, and Vault down in the middle of 10,000: about an hour; the tests play a sample
	$(GO) test ./cmd/e2e -run Chaos -chaos -parallel 8 -v -count=1 -timeout 3h

ROUNDS ?= 20

power: ## a loss of power at every sync, in ROUNDS rounds, and a failure of every write: about ten minutes; the tests play a sample
	$(GO) test ./store/power ./store/bolt -run '^(TestLossOfPower|TestPowerLoss|TestFaultAtEachWrite)$$' -power $(ROUNDS) -v -count=1 -timeout 2h

# A target that fails is run again: an input that broke it was saved and breaks it again, while Go's own fuzzer
# sometimes fails only because its time was up.
fuzz:
	@set -e; for package in $$($(GO) list $(PACKAGES)); do \
		names=$$($(GO) test -list '^Fuzz' $$package); \
		for name in $$(echo "$$names" | grep '^Fuzz' || true); do \
			fuzz="$(GO) test -run=^$$ -fuzz=^$$name$$ -fuzztime=$(FUZZTIME) $$package"; \
			echo "$$package $$name"; $$fuzz || $$fuzz; \
		done; \
	done

lint:
	@unformatted=$$(gofmt -l .); if [ -n "$$unformatted" ]; then echo "not formatted by gofmt:"; echo "$$unformatted"; exit 1; fi
	$(GO) vet $(PACKAGES)
	GOBIN=$(CURDIR)/build/bin $(GO) install $(STATICCHECK)
	build/bin/staticcheck $(PACKAGES)
	$(GO) run ./cmd/rules/structure
	$(GO) run ./cmd/rules/english

# govulncheck ends with 3 when it found something. Not reaching its database is no finding, and is said.
vuln:
	GOBIN=$(CURDIR)/build/bin $(GO) install $(GOVULNCHECK)
	@status=0; build/bin/govulncheck $(PACKAGES) >build/vuln.log 2>&1 || status=$$?; cat build/vuln.log; \
	if [ $$status -ne 0 ] && [ $$status -ne 3 ] && grep -q 'vuln\.go\.dev' build/vuln.log; then \
		echo "vuln: NOT CHECKED: the database at vuln.go.dev cannot be reached from here"; status=0; \
	fi; exit $$status

clean:
	rm -rf build
