package main

import (
	"context"
	"errors"
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/spf13/cobra"

	"github.com/pawlsec/pawl/plugins/postgres"
)

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
