package main

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/pawlsec/pawl/cmd/wire"
	"github.com/pawlsec/pawl/plugins/postgres"
	"github.com/pawlsec/pawl/plugins/vault"
)

func vaultCommand() *cobra.Command {
	c := &cobra.Command{Use: "vault", Short: "Print the setup that Vault and the targets need",
		Long:    "Print the setup that Vault and the targets need, with the least rights that suffice.",
		Example: "  pawl vault plan --config pawl.yaml --broker spiffe://example.org/pawl"}
	c.AddCommand(vaultPlanCommand(), postgresSQLCommand())
	return c
}

func vaultPlanCommand() *cobra.Command {
	var config, id, trust, jwks string
	c := &cobra.Command{
		Use: "plan --config FILE --broker SPIFFE-ID", Args: cobra.NoArgs,
		Short: "Print the writes that Vault needs, each with its reason",
		Long: "Print the writes that Vault needs as JSON lines, each with its reason: the policies, the token roles\n" +
			"and the auth role. Nothing is written to Vault. The trust domain's authorities come from --trust or from\n" +
			"the Workload API. With vault.auth jwt Vault needs the trust domain's JWT keys instead: it fetches them from\n" +
			"--jwks-url and follows their rotation, or keeps a copy of those that the Workload API gives now.",
		Example: "  pawl vault plan --config pawl.yaml --broker spiffe://example.org/pawl --trust bundle.pem",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := required(cmd, "config", "broker"); err != nil {
				return err
			}
			setup, writes, err := vaultSetup(cmd.Context(), config, id, trust, jwks)
			if err != nil {
				return err
			}
			plan, err := setup.Plan()
			if err != nil {
				return err
			}
			plan = append(plan, writes...)
			enc := json.NewEncoder(cmd.OutOrStdout())
			enc.SetEscapeHTML(false)
			for _, w := range plan {
				if err := enc.Encode(w); err != nil {
					return err
				}
			}
			return nil
		},
	}
	c.Flags().StringVar(&config, "config", "", "the broker's configuration; required")
	c.Flags().StringVar(&id, "broker", "", "the broker's SPIFFE ID; required")
	c.Flags().StringVar(&trust, "trust", "",
		"PEM file of the trust domain's X.509 authorities; empty: fetch them from the Workload API")
	c.Flags().StringVar(&jwks, "jwks-url", "",
		"with vault.auth jwt: where Vault fetches the trust domain's JWT keys; empty: copy them from the Workload API")
	return c
}

func vaultSetup(ctx context.Context, file, id, trust, jwks string) (vault.SetupConfig, []vault.Write, error) {
	broker, err := spiffeid.FromString(id)
	if err != nil {
		return vault.SetupConfig{}, nil, misuse{hinted{fmt.Errorf("--broker: %w", err),
			"it is the SPIFFE ID that the broker runs as"}}
	}
	config, err := wire.ReadConfig(file)
	if err != nil {
		return vault.SetupConfig{}, nil, err
	}
	running, err := wire.LoadPolicy(config.Policy)
	if err != nil {
		return vault.SetupConfig{}, nil, err
	}
	setup := vault.SetupConfig{BrokerID: broker, Role: config.Vault.Role, Mount: config.Vault.Mount}
	if config.Vault.Auth == "jwt" {
		setup.JWTAudience, setup.JWKSURL = config.Vault.Audience, jwks
		if jwks == "" {
			setup.JWTKeysPEM, err = jwtKeysPEM(ctx, broker.TrustDomain(), config.WorkloadAPI)
		}
	} else if jwks != "" {
		err = misuse{errors.New("--jwks-url is for a configuration with vault.auth jwt")}
	} else {
		setup.TrustPEM, err = trustPEM(ctx, broker.TrustDomain(), config.WorkloadAPI, trust)
	}
	if err != nil {
		return vault.SetupConfig{}, nil, err
	}
	tools := running.Current().Tools()
	reads, err := wire.Reads(tools, config.Backends)
	if err != nil {
		return vault.SetupConfig{}, nil, err
	}
	writes, err := wire.Writes(tools, config.Backends)
	setup.Tools, setup.Reads = wire.Access(tools, config.Backends), reads
	return setup, writes, err
}

// jwtKeysPEM fetches the public keys of the trust domain's JWT authorities.
func jwtKeysPEM(ctx context.Context, td spiffeid.TrustDomain, api string) (keys []string, err error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	var options []workloadapi.ClientOption
	if api != "" {
		options = append(options, workloadapi.WithAddr(api))
	}
	bundles, err := workloadapi.FetchJWTBundles(ctx, options...)
	if err != nil {
		return nil, hinted{fmt.Errorf("fetching the JWT keys from the Workload API: %w", err), "name them with --jwks-url"}
	}
	bundle, err := bundles.GetJWTBundleForTrustDomain(td)
	if err != nil {
		return nil, err
	}
	authorities := bundle.JWTAuthorities()
	for _, id := range slices.Sorted(maps.Keys(authorities)) {
		der, err := x509.MarshalPKIXPublicKey(authorities[id])
		if err != nil {
			return nil, fmt.Errorf("the JWT key %q: %w", id, err)
		}
		keys = append(keys, string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})))
	}
	return keys, nil
}

func trustPEM(ctx context.Context, td spiffeid.TrustDomain, api, file string) (string, error) {
	if file != "" {
		raw, err := os.ReadFile(file)
		return string(raw), err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	var options []workloadapi.ClientOption
	if api != "" {
		options = append(options, workloadapi.WithAddr(api))
	}
	bundles, err := workloadapi.FetchX509Bundles(ctx, options...)
	if err != nil {
		return "", hinted{fmt.Errorf("fetching the trust bundle from the Workload API: %w", err),
			"give the authorities with --trust"}
	}
	bundle, err := bundles.GetX509BundleForTrustDomain(td)
	if err != nil {
		return "", err
	}
	var out bytes.Buffer
	for _, cert := range bundle.X509Authorities() {
		if err := pem.Encode(&out, &pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}); err != nil {
			return "", err
		}
	}
	return out.String(), nil
}

func postgresSQLCommand() *cobra.Command {
	var noSuperuser bool
	c := &cobra.Command{
		Use: "postgres-sql", Short: "Print the script that a PostgreSQL target needs", Args: cobra.NoArgs,
		Long: "Print the script that a PostgreSQL target needs: the schema pawl with the functions that create, sever\n" +
			"and clean up agents' logins. A superuser runs it once in each database; it may be repeated.\n\n" +
			"With --no-superuser it is for a role with CREATEROLE that owns the database, as managed services give. There\n" +
			"tools with the setting network get no secret, and agents can make large objects.",
		Example: "  pawl vault postgres-sql | psql --single-transaction shop",
		RunE: func(cmd *cobra.Command, _ []string) error {
			script := postgres.Bootstrap()
			if noSuperuser {
				script = postgres.BootstrapWithoutSuperuser()
			}
			_, err := fmt.Fprint(cmd.OutOrStdout(), script)
			return err
		},
	}
	c.Flags().BoolVar(&noSuperuser, "no-superuser", false, "for a role with CREATEROLE that owns the database")
	return c
}

func shapesCommand() *cobra.Command {
	var dsn string
	c := &cobra.Command{
		Use: "shapes", Short: "List the shapes of agents' rights in a PostgreSQL database, and drop their views",
		Long: "A shape is a distinct set of tables, verbs, row filter and limits in a PostgreSQL database. One with a row\n" +
			"filter has views, and a view blocks ALTER TYPE, DROP COLUMN and DROP TABLE. This command needs the login of\n" +
			"the role that ran the setup script. The environment of psql applies: PGHOST, PGUSER, PGPASSFILE.",
		Example: "  pawl shapes list --dsn 'host=db dbname=shop'\n  pawl shapes drop --dsn dbname=shop public.orders",
	}
	c.PersistentFlags().StringVar(&dsn, "dsn", "", "the database, as psql takes it; empty: the environment of psql")
	list := &cobra.Command{
		Use: "list", Short: "List the shapes, those used last first", Args: cobra.NoArgs,
		Long: "List the shapes, those used last first.", Example: "  pawl shapes list --dsn dbname=shop",
		RunE: onDatabase(&dsn, func(cmd *cobra.Command, conn *pgx.Conn, _ []string) error {
			all, err := postgres.Shapes(cmd.Context(), conn)
			if err != nil {
				return err
			}
			w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 4, 2, ' ', 0)
			fmt.Fprintln(w, "SHAPE\tLOGINS\tUSED\tVERBS\tFILTER\tTABLES\tAGENT")
			for _, s := range all {
				filter := "-"
				if s.Filter != "" {
					filter = s.Filter
				}
				fmt.Fprintf(w, "%s\t%d\t%s\t%s\t%s\t%s\t%s\n", s.Shape, s.Logins, s.Used.UTC().Format(time.RFC3339), s.Verbs,
					oneLine(filter), oneLine(s.Tables), oneLine(s.Agent))
			}
			return w.Flush()
		}),
	}
	drop := &cobra.Command{
		Use: "drop TABLE...", Short: "Drop the views of agents that read a table", Args: cobra.MinimumNArgs(1),
		Long: "Drop the views of agents that read a table, so that it can be altered or dropped. They come again with the\n" +
			"next step that needs them; logins of the present ones fail until then. A migration better begins with\n" +
			"SELECT pawl.drop_views('schema.table') in its own transaction: then no view comes in between.",
		Example: "  pawl shapes drop --dsn dbname=shop public.orders",
		RunE: onDatabase(&dsn, func(cmd *cobra.Command, conn *pgx.Conn, tables []string) error {
			for _, t := range tables {
				n, err := postgres.DropViews(cmd.Context(), conn, t)
				if err != nil {
					return err
				}
				fmt.Fprintf(cmd.OutOrStdout(), "%s: dropped the views of %d shapes\n", oneLine(t), n)
			}
			return nil
		}),
	}
	c.AddCommand(list, drop)
	return c
}

// onDatabase runs f with a connection to the database.
func onDatabase(
	dsn *string, f func(cmd *cobra.Command, conn *pgx.Conn, args []string) error,
) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		config, err := pgx.ParseConfig(*dsn)
		if err != nil {
			return misuse{hinted{errors.New("--dsn does not parse"), "such as --dsn 'host=db dbname=shop'"}}
		}
		conn, err := pgx.ConnectConfig(cmd.Context(), config)
		if err != nil {
			return hinted{err, "does psql reach the database with the same values?"}
		}
		defer conn.Close(context.WithoutCancel(cmd.Context())) //nolint:errcheck // nothing is left to be done in it
		return f(cmd, conn, args)
	}
}
