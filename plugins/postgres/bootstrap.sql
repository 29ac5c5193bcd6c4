-- The objects that Pawl needs in a database for which it issues credentials. Run this script as a superuser, in one
-- transaction. It may be repeated. It needs PostgreSQL 15 or newer.
--
-- For a service that gives no superuser, "pawl vault postgres-sql --no-superuser" prints a variant for a role with
-- CREATEROLE that owns the database. The variant does not promise as much: pg_hba.conf cannot be read, so tools with
-- the setting "network" get no secret, and agents can make large objects. SELECT pawl.limits() returns these limits.
--
-- A row filter is a view, which blocks some changes of its table. A migration begins with
-- SELECT pawl.drop_views('schema.table') in its transaction. Let its role do that:
--
--   GRANT USAGE ON SCHEMA pawl TO ROLE; GRANT EXECUTE ON FUNCTION pawl.drop_views(regclass) TO ROLE;
--
-- Roles and their rights:
--   pawl_maker    owns all objects of this script and cannot log in. It makes and drops roles; from PostgreSQL 16 on it
--                 can alter only the roles that it made. Agents can get a verb on a table if pawl_maker holds the verb
--                 on it WITH GRANT OPTION. REVOKE … FROM pawl_maker CASCADE withdraws the table from all agents.
--   pawl_vault    is Vault's connection. It makes and ends logins with names of Pawl's form, and nothing else.
--   pawl_shaper   makes shapes: groups that hold certain verbs on certain tables and nothing else.
--   pawl_revoker  severs, inspects and removes agents' logins, by grant id.
--
-- PostgreSQL checks in pg_hba.conf from which addresses a user may log in. A tool with the setting "network: NAME"
-- makes its logins members of pawl_net_NAME. Its mints are refused until pg_hba.conf rejects the members of that role
-- from all other addresses. For the network "office", add these lines before any line for all users of this database:
--
--   hostssl  DATABASE  +pawl_net_office  10.1.0.0/16  scram-sha-256
--   host     DATABASE  +pawl_net_office  all          reject
--   local    DATABASE  +pawl_net_office               reject
--
-- If the database has no large objects, the first run of this script takes from PUBLIC the right to make them: agents
-- could make more than the server can drop. Applications that need them get it back like this:
--
--   GRANT EXECUTE ON FUNCTION lo_creat(int), lo_create(oid), lo_from_bytea(oid, bytea) TO APPLICATION;
--
-- Every function checks names against a pattern before it uses them, and quotes them with %I and %L. It resolves names
-- in pg_catalog only. (search_path lists pg_temp last; otherwise PostgreSQL would search it first.)

SET LOCAL search_path = pg_catalog, pg_temp;
SET LOCAL lock_timeout = '10s';

DO $$
DECLARE
    before int := 0;
    views  name;
BEGIN
    IF current_setting('server_version_num')::int < 150000 THEN
        RAISE 'PostgreSQL 15 or newer is required: in older versions every user may create objects in schema public';
    END IF;
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'pawl_maker') THEN
        CREATE ROLE pawl_maker NOLOGIN CREATEROLE;
    END IF;
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'pawl_vault') THEN
        CREATE ROLE pawl_vault LOGIN CONNECTION LIMIT 64;
    END IF;
    GRANT pg_signal_backend TO pawl_maker;
    GRANT EXECUTE ON FUNCTION pg_hba_file_rules() TO pawl_maker; -- superuser
    EXECUTE format('GRANT CREATE, CONNECT ON DATABASE %I TO pawl_maker WITH GRANT OPTION', current_database());
    -- Only for the time of this script. A member of pawl_maker that repeats a grant to it would grant it as pawl_maker.
    -- no superuser: GRANT pawl_maker TO CURRENT_USER;
    PERFORM set_config('pawl.setup_role', current_user, true);
    CREATE SCHEMA IF NOT EXISTS pawl AUTHORIZATION pawl_maker;
    IF (SELECT nspowner FROM pg_namespace WHERE nspname = 'pawl') <> 'pawl_maker'::regrole THEN
        RAISE 'schema pawl has another owner than pawl_maker: if this database was restored from a dump without the '
            'roles, run DROP SCHEMA pawl CASCADE, then this script, and grant the tables to pawl_maker again';
    END IF;
    -- Views of agents that were restored without the roles.
    FOR views IN SELECT n.nspname FROM pg_namespace n
        WHERE n.nspname ~ '^pawl_[0-9a-f]{12}$' AND n.nspowner <> 'pawl_maker'::regrole
            AND NOT EXISTS (SELECT FROM pg_class c WHERE c.relnamespace = n.oid AND c.relkind <> 'v') LOOP
        EXECUTE format('DROP SCHEMA %I CASCADE', views);
    END LOOP;
    COMMENT ON SCHEMA pawl IS 'Functions and records of Pawl, which issues logins to agents. Its script made them.';
    IF to_regprocedure('pawl.version()') IS NOT NULL THEN
        before := pawl.version();
    END IF;
    PERFORM set_config('pawl.version_before', before::text, true);
    IF before > 3 THEN
        RAISE 'schema pawl has a newer version than this script';
    END IF;
    -- By default every user may make large objects, a million in seconds. A database that has none gets on without.
    IF before < 2 AND NOT EXISTS (SELECT FROM pg_largeobject_metadata) THEN
        REVOKE EXECUTE ON FUNCTION lo_creat(int), lo_create(oid), lo_from_bytea(oid, bytea) FROM PUBLIC;
    END IF;
END $$;

SET LOCAL ROLE pawl_maker;

-- pawl_maker makes the broker's two groups, so that it may add logins to them.
DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'pawl_shaper') THEN
        CREATE ROLE pawl_shaper NOLOGIN;
    END IF;
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'pawl_revoker') THEN
        CREATE ROLE pawl_revoker NOLOGIN;
    END IF;
END $$;

-- Their results changed in version 2 or 3.
DROP FUNCTION IF EXISTS pawl.sever(text[]), pawl.disable(text[]), pawl.collect(interval),
    pawl.ensure_shape(text, text), pawl.grant_table(text, jsonb, text, text), pawl.position();

CREATE OR REPLACE FUNCTION pawl.version() RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT 3';

CREATE TABLE IF NOT EXISTS pawl.shapes (
    shape     text PRIMARY KEY,
    spec      text NOT NULL,
    last_used timestamptz NOT NULL DEFAULT now()
);
ALTER TABLE pawl.shapes ADD COLUMN IF NOT EXISTS agent text NOT NULL DEFAULT ''; -- that it was made for

-- The groups that hold rights on tables, schemas and the database. The group of a shape is a member of some.
CREATE TABLE IF NOT EXISTS pawl.groups (name text PRIMARY KEY);

-- One row per grant, so that PostgreSQL itself refuses a second credential for a grant. The oid identifies sessions
-- that outlive their role. A row without a name bars a grant: it has no credential and can never get one.
CREATE TABLE IF NOT EXISTS pawl.logins (
    grant_id text PRIMARY KEY,
    name     text,
    role     oid,
    ended    timestamptz
);
CREATE INDEX IF NOT EXISTS logins_role ON pawl.logins (role);
-- The server that made the login. A record that was dumped and restored elsewhere proves nothing about the login.
ALTER TABLE pawl.logins ADD COLUMN IF NOT EXISTS server bigint;

CREATE OR REPLACE FUNCTION pawl.server_id() RETURNS bigint LANGUAGE sql STABLE AS
$$ SELECT system_identifier FROM pg_control_system() $$;

-- Versions 1 and 2 did not record it. Their records may come from a dump of another server.
UPDATE pawl.logins l SET server = pawl.server_id()
WHERE server IS NULL AND current_setting('pawl.version_before') < '3' AND name IS NOT NULL
    AND (ended IS NOT NULL OR EXISTS (SELECT FROM pg_roles r WHERE r.oid = l.role AND r.rolname = l.name));

-- Its timeline then. A standby, or a copy of the server's files, has the same identity; its promotion begins a timeline.
-- A version that did not record it made the login in this timeline or in one before.
ALTER TABLE pawl.logins ADD COLUMN IF NOT EXISTS timeline text;

CREATE OR REPLACE FUNCTION pawl.timeline() RETURNS text LANGUAGE sql STABLE AS
$$ SELECT CASE WHEN NOT pg_is_in_recovery() THEN substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) END $$;

UPDATE pawl.logins SET timeline = pawl.timeline()
WHERE timeline IS NULL AND name IS NOT NULL AND server = pawl.server_id();

-- Reports whether this server made the login, or pawl.adopt_logins made it answer for the login.
CREATE OR REPLACE FUNCTION pawl.has_record(login text) RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT EXISTS (SELECT FROM pawl.logins l
        WHERE l.grant_id = substr(login, 6, 26) AND coalesce(l.name, login) = login AND l.server = pawl.server_id())
$$;

-- pawl.lock_shapes locks this empty table. An agent can take an advisory lock, but not this one. A row would not do: it
-- is free before other sessions learn what its holder changed in the catalogs. (Only autovacuum's own lock conflicts.)
CREATE TABLE IF NOT EXISTS pawl.locks (name text PRIMARY KEY);
ALTER TABLE pawl.locks SET (autovacuum_enabled = false);

CREATE OR REPLACE FUNCTION pawl.is_login(name text) RETURNS boolean LANGUAGE sql IMMUTABLE AS
$$ SELECT name ~ '^pawl-gr[0-9a-hjkmnp-tv-z]{24}-[0-9a-f]{12}-[A-Za-z0-9]{8}$' $$;

-- Agents' logins as PostgreSQL knows them, by the grant id in the name. Do not cast name to text: that would hide the
-- index on it.
CREATE OR REPLACE VIEW pawl.roles AS
    SELECT substr(rolname, 6, 26) AS grant_id, rolname AS name, oid AS role, rolcanlogin, rolvaliduntil
    FROM pg_roles WHERE pawl.is_login(rolname);

-- Ending a login must not wait for a synchronous standby. Until a commit is complete, no other transaction sees it: the
-- login and its sessions would work for as long as the standby is gone. (A SET clause of a function is no substitute.
-- It ends before the commit.) Making a login or a shape does not wait either: pawl.bar and other shapes wait for it.
CREATE OR REPLACE FUNCTION pawl.commit_locally() RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM set_config('synchronous_commit', 'local', true);
END $$;

-- ---------------------------------------------------------------- shapes

-- A specification is the canonical JSON that the broker hashed. Its hash is the shape's name, so a caller cannot
-- register one specification under the name of another.
CREATE OR REPLACE FUNCTION pawl.check_spec(in_shape text, in_spec text) RETURNS jsonb
LANGUAGE plpgsql AS $$
DECLARE
    s jsonb;
BEGIN
    IF octet_length(in_spec) > 65536
        OR in_shape IS DISTINCT FROM left(encode(sha256(convert_to(in_spec, 'UTF8')), 'hex'), 12) THEN
        RAISE 'the shape must be the hash of its specification' USING ERRCODE = '22023';
    END IF;
    s := in_spec::jsonb;
    IF s->>'database' IS DISTINCT FROM current_database()
        OR EXISTS (SELECT FROM jsonb_object_keys(s) k WHERE k NOT IN
            ('database', 'tables', 'verbs', 'filter', 'network', 'connections', 'statement_ms', 'idle_ms'))
        OR (s ? 'network' AND (s->>'network' ~ '^[a-z][a-z0-9_]{0,31}$') IS NOT TRUE)
        OR jsonb_array_length(s->'tables') NOT BETWEEN 1 AND 32
        OR jsonb_array_length(s->'verbs') NOT BETWEEN 1 AND 4
        OR EXISTS (SELECT FROM jsonb_array_elements(s->'tables') t
            WHERE jsonb_array_length(t) <> 2 OR t->>0 IS NULL OR t->>1 IS NULL)
        OR EXISTS (SELECT FROM jsonb_array_elements_text(s->'verbs') v
            WHERE v IS NULL OR v NOT IN ('select', 'insert', 'update', 'delete'))
        OR (s ? 'filter' AND (s#>>'{filter,column}' IS NULL OR s#>>'{filter,value}' IS NULL))
        OR ((s->>'connections')::int BETWEEN 1 AND 100) IS NOT TRUE
        OR ((s->>'statement_ms')::int BETWEEN 1 AND 86400000) IS NOT TRUE
        OR ((s->>'idle_ms')::int BETWEEN 1 AND 86400000) IS NOT TRUE THEN
        RAISE 'malformed specification' USING ERRCODE = '22023';
    END IF;
    RETURN s;
END $$;

-- Refuses a table unless pawl_maker holds all the verbs on it WITH GRANT OPTION. The error is the same as for a table
-- that does not exist. Agents never get a table that pawl_maker itself owns.
CREATE OR REPLACE FUNCTION pawl.check_grantable(s jsonb) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    t record;
BEGIN
    FOR t IN SELECT e->>0 AS nsp, e->>1 AS rel, (
            SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
            WHERE n.nspname = e->>0 AND c.relname = e->>1 AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
                AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast', 'pawl')
                AND c.relowner <> 'pawl_maker'::regrole) AS oid
        FROM jsonb_array_elements(s->'tables') e LOOP
        IF t.oid IS NULL OR EXISTS (SELECT FROM jsonb_array_elements_text(s->'verbs') v
            WHERE NOT has_table_privilege(t.oid, v || ' WITH GRANT OPTION')) THEN
            RAISE 'table %.% cannot be granted to agents', t.nsp, t.rel USING ERRCODE = '42501';
        END IF;
    END LOOP;
END $$;

-- Refuses a network that pg_hba.conf does not confine, by the present content of the file. For TCP and for the Unix
-- socket there must be a line that rejects all members. No line before it may accept users of any name.
CREATE OR REPLACE FUNCTION pawl.check_network(net text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    confined int;
BEGIN
    IF NOT has_function_privilege('pg_hba_file_rules()', 'EXECUTE') THEN
        RAISE 'tools with the setting network get no secret here: this database was set up without a superuser, so '
            'that pg_hba.conf cannot be read' USING ERRCODE = '0A000';
    END IF;
    WITH rules AS (
        SELECT h.ordinality AS n, h.type = 'local' AS socket, h.auth_method = 'reject' AS rejects, h.address, h.error,
            h.user_name = ARRAY['+pawl_net_' || net] AS members,
            EXISTS (SELECT FROM unnest(h.user_name) u WHERE u = 'all' OR u LIKE '/%') AS all_users,
            EXISTS (SELECT FROM unnest(h.database) d WHERE d IN ('all', current_database())) AS here,
            EXISTS (SELECT FROM unnest(h.database) d
                WHERE d IN ('sameuser', 'samerole', 'samegroup') OR d LIKE '/%') AS maybe_here
        FROM pg_hba_file_rules() WITH ORDINALITY h)
    SELECT count(DISTINCT r.socket) INTO confined FROM rules r
    WHERE r.members AND r.rejects AND r.here AND (r.socket OR r.address = 'all') AND NOT EXISTS (SELECT FROM rules e
        WHERE e.n < r.n AND e.socket = r.socket AND e.all_users AND (e.here OR e.maybe_here) AND NOT e.rejects);
    IF confined <> 2 OR EXISTS (SELECT FROM pg_hba_file_rules() h WHERE h.error IS NOT NULL) THEN
        RAISE 'pg_hba.conf does not confine network %', net USING ERRCODE = '42501';
    END IF;
END $$;

-- Returns the relation on which the shape's group holds its verbs: the table itself, or the view that filters its rows.
CREATE OR REPLACE FUNCTION pawl.reach(in_shape text, s jsonb, nsp text, rel text) RETURNS text
LANGUAGE sql STABLE AS
$$ SELECT format('%I.%I', CASE WHEN s ? 'filter' THEN 'pawl_' || in_shape ELSE nsp END, rel) $$;

-- Returns the columns of a relation with their types, in order.
CREATE OR REPLACE FUNCTION pawl.columns_of(relation oid) RETURNS text LANGUAGE sql STABLE AS $$
    SELECT string_agg(format('%I %s %s', attname, format_type(atttypid, atttypmod), attcollation), ', ' ORDER BY attnum)
    FROM pg_attribute WHERE attrelid = relation AND attnum > 0 AND NOT attisdropped
$$;

-- Returns the views that read a relation.
CREATE OR REPLACE FUNCTION pawl.views_on(relation oid) RETURNS TABLE (view oid) LANGUAGE sql STABLE AS $$
    SELECT DISTINCT r.ev_class FROM pg_depend d JOIN pg_rewrite r ON r.oid = d.objid
    WHERE d.classid = 'pg_rewrite'::regclass AND d.refclassid = 'pg_class'::regclass AND d.refobjid = relation
        AND r.ev_class <> relation
$$;

-- Reports whether the group still has all the rights of the shape. That is false after a table was withdrawn, or
-- dropped and made again, and with a filter also after another table got its name.
CREATE OR REPLACE FUNCTION pawl.shape_holds(in_shape text, s jsonb) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    grp oid := (SELECT oid FROM pg_roles WHERE rolname = 'pawl-shape-' || in_shape);
BEGIN
    RETURN grp IS NOT NULL AND (s ? 'network' AND NOT EXISTS (
            SELECT FROM pg_auth_members m JOIN pg_roles n ON n.oid = m.roleid
            WHERE m.member = grp AND n.rolname = 'pawl_net_' || (s->>'network'))) IS NOT TRUE
        AND NOT EXISTS (
        SELECT FROM jsonb_array_elements(s->'tables') e, jsonb_array_elements_text(s->'verbs') v
        WHERE has_table_privilege(grp, to_regclass(pawl.reach(in_shape, s, e->>0, e->>1)), v) IS NOT TRUE
            OR v = 'insert' AND EXISTS (SELECT FROM pawl.sequences_of(to_regclass(format('%I.%I', e->>0, e->>1))) q
                WHERE has_sequence_privilege(grp, q.seq, 'USAGE') IS NOT TRUE))
        AND NOT (s ? 'filter' AND EXISTS (SELECT FROM jsonb_array_elements(s->'tables') e
            CROSS JOIN LATERAL to_regclass(format('%I.%I', e->>0, e->>1)) t
            CROSS JOIN LATERAL to_regclass(pawl.reach(in_shape, s, e->>0, e->>1)) v
            WHERE v NOT IN (SELECT o.view FROM pawl.views_on(t) o)));
END $$;

-- Reports whether the views of a filter have the columns of their tables.
CREATE OR REPLACE FUNCTION pawl.columns_hold(in_shape text, s jsonb) RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT NOT (s ? 'filter' AND EXISTS (SELECT FROM jsonb_array_elements(s->'tables') e
        WHERE pawl.columns_of(to_regclass(pawl.reach(in_shape, s, e->>0, e->>1)))
            <> pawl.columns_of(to_regclass(format('%I.%I', e->>0, e->>1)))))
$$;

CREATE OR REPLACE FUNCTION pawl.group_name(kind text, rights text, VARIADIC object text[]) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT format('pawl-%s-%s-%s', kind, left(encode(sha256(convert_to(
        jsonb_build_array(current_database(), object)::text, 'UTF8')), 'hex'), 20), rights)
$$;

-- Makes the group of an object of this database unless it exists, and returns its name. A list of privileges has room
-- for about 2,400 roles. So rights on objects that many shapes share are granted to one group for each right, and never
-- to the group of a shape.
CREATE OR REPLACE FUNCTION pawl.ensure_group(kind text, rights text, VARIADIC object text[]) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    grp text := pawl.group_name(kind, rights, VARIADIC object);
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = grp) THEN
        EXECUTE format('CREATE ROLE %I NOLOGIN', grp);
        EXECUTE format('COMMENT ON ROLE %I IS %L', grp, format('Pawl''s agents: %s on %s %s in database %I', rights,
            kind, (SELECT string_agg(quote_ident(o), '.' ORDER BY n) FROM unnest(object) WITH ORDINALITY u(o, n)),
            current_database()));
    END IF;
    INSERT INTO pawl.groups (name) VALUES (grp) ON CONFLICT DO NOTHING;
    RETURN grp;
END $$;

-- Grants a right on a relation to a group. It revokes the group's rights on other relations: one that had the name
-- before still has them.
CREATE OR REPLACE FUNCTION pawl.grant_relation(grp text, kind text, relation regclass, rights text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    other regclass;
BEGIN
    EXECUTE format('GRANT %s ON %s %s TO %I', rights, kind, relation, grp);
    FOR other IN SELECT d.objid FROM pg_shdepend d WHERE d.refclassid = 'pg_authid'::regclass
        AND d.refobjid = (SELECT oid FROM pg_roles WHERE rolname = grp) AND d.classid = 'pg_class'::regclass
        AND d.dbid = (SELECT oid FROM pg_database WHERE datname = current_database())
        AND d.deptype = 'a' AND d.objid <> relation LOOP
        EXECUTE format('REVOKE ALL ON %s %s FROM %I', kind, other, grp);
    END LOOP;
END $$;

-- Returns a relation and the tables into which an insert into it goes, if it is a simple view.
CREATE OR REPLACE FUNCTION pawl.inserted(relation oid) RETURNS TABLE (target oid) LANGUAGE sql STABLE AS $$
    WITH RECURSIVE below AS (
        SELECT relation AS oid
        UNION
        SELECT d.refobjid FROM below b JOIN pg_class v ON v.oid = b.oid AND v.relkind = 'v'
            AND pg_relation_is_updatable(v.oid, false) & 8 = 8
        JOIN pg_rewrite r ON r.ev_class = v.oid
        JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid
            AND d.refclassid = 'pg_class'::regclass AND d.refobjid <> v.oid)
    SELECT oid FROM below
$$;

-- Returns the defaults that an insert into a relation evaluates with the agent's own rights: those of its columns, and
-- of the domains that are their types.
CREATE OR REPLACE FUNCTION pawl.defaults_of(relation oid) RETURNS TABLE (class oid, object oid)
LANGUAGE sql STABLE AS $$
    SELECT 'pg_attrdef'::regclass, a.oid FROM pawl.inserted(relation) i JOIN pg_attrdef a ON a.adrelid = i.target
    UNION
    SELECT 'pg_type'::regclass, t.oid FROM pawl.inserted(relation) i
    JOIN pg_attribute a ON a.attrelid = i.target AND a.attnum > 0 AND NOT a.attisdropped
    JOIN pg_type t ON t.oid = a.atttypid AND t.typtype = 'd' AND t.typdefault IS NOT NULL
$$;

-- Returns the sequences that the defaults of a table's columns use. (It is volatile, so that the planner does not mix
-- its conditions with those of the caller: has_sequence_privilege fails for other relations.)
CREATE OR REPLACE FUNCTION pawl.sequences_of(relation oid) RETURNS TABLE (seq regclass) LANGUAGE sql AS $$
    SELECT DISTINCT c.oid::regclass FROM pawl.defaults_of(relation) f
    JOIN pg_depend d ON d.classid = f.class AND d.objid = f.object AND d.refclassid = 'pg_class'::regclass
    JOIN pg_class c ON c.oid = d.refobjid AND c.relkind = 'S'
$$;

-- Returns the statements to run after the setup, so that agents can insert into the tables that they may get.
CREATE OR REPLACE FUNCTION pawl.sequence_grants() RETURNS SETOF text LANGUAGE sql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s' AS $$
    SELECT DISTINCT format('GRANT USAGE ON SEQUENCE %I.%I TO pawl_maker WITH GRANT OPTION', n.nspname, s.relname)
    FROM pg_class c CROSS JOIN LATERAL pawl.sequences_of(c.oid) q
    JOIN pg_class s ON s.oid = q.seq JOIN pg_namespace n ON n.oid = s.relnamespace
    WHERE c.relkind IN ('r', 'p', 'f', 'v') AND has_table_privilege('pawl_maker', c.oid, 'INSERT WITH GRANT OPTION')
        AND NOT has_sequence_privilege('pawl_maker', q.seq, 'USAGE WITH GRANT OPTION')
        AND NOT has_sequence_privilege('public', q.seq, 'USAGE')
$$;

-- Reports whether row security lets an agent use a verb on a table. A policy must apply to PUBLIC or to a group of the
-- agent. With a filter the policies of the view's owner apply.
CREATE OR REPLACE FUNCTION pawl.rows_visible(in_shape text, s jsonb, nsp text, rel text, verb text) RETURNS boolean
LANGUAGE sql STABLE AS $$
    SELECT NOT c.relrowsecurity OR EXISTS (SELECT FROM pg_policy p WHERE p.polrelid = c.oid AND p.polpermissive
        AND p.polcmd IN ('*', CASE verb WHEN 'select' THEN 'r' WHEN 'insert' THEN 'a' WHEN 'update' THEN 'w'
            ELSE 'd' END)
        AND (0 = ANY (p.polroles) OR EXISTS (SELECT FROM pg_roles r WHERE r.oid = ANY (p.polroles)
            AND CASE WHEN s ? 'filter' THEN pg_has_role('pawl_maker', r.oid, 'USAGE')
                ELSE r.rolname IN ('pawl-shape-' || in_shape, pawl.group_name('table', verb, nsp, rel),
                    'pawl_net_' || (s->>'network')) END)))
        OR s ? 'filter' AND (SELECT r.rolbypassrls FROM pg_roles r WHERE r.rolname = 'pawl_maker')
    FROM pg_class c WHERE c.oid = format('%I.%I', nsp, rel)::regclass
$$;

-- Refuses a shape if what is around its tables refuses its logins. The error names the object and the remedy.
CREATE OR REPLACE FUNCTION pawl.check_around(s jsonb) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    t record;
BEGIN
    FOR t IN SELECT DISTINCT quote_ident(e->>0) AS nsp FROM jsonb_array_elements(s->'tables') e
        WHERE NOT has_schema_privilege('public', e->>0, 'USAGE')
            AND NOT has_schema_privilege(e->>0, CASE WHEN s ? 'filter' THEN 'USAGE' ELSE 'USAGE WITH GRANT OPTION' END)
    LOOP
        RAISE 'schema % cannot be granted to agents: GRANT USAGE ON SCHEMA % TO pawl_maker WITH GRANT OPTION',
            t.nsp, t.nsp USING ERRCODE = '0A000';
    END LOOP;
    -- The user of a view with security_invoker needs the rights on what it reads, also below another view.
    FOR t IN SELECT format('%I.%I', e->>0, e->>1) AS name, format('%I.%I', n.nspname, b.relname) AS below, v
        FROM jsonb_array_elements(s->'tables') e
        CROSS JOIN LATERAL (SELECT format('%I.%I', e->>0, e->>1)::regclass AS oid) x
        JOIN pg_class c ON c.oid = x.oid AND c.relkind = 'v' AND EXISTS (SELECT FROM pg_options_to_table(c.reloptions) o
            WHERE o.option_name = 'security_invoker' AND o.option_value::boolean)
        JOIN pg_rewrite r ON r.ev_class = c.oid
        JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid
            AND d.refclassid = 'pg_class'::regclass AND d.refobjid <> c.oid
        JOIN pg_class b ON b.oid = d.refobjid JOIN pg_namespace n ON n.oid = b.relnamespace
        CROSS JOIN LATERAL jsonb_array_elements_text(s->'verbs') v
        WHERE NOT has_table_privilege('public', b.oid, v)
            AND (s ? 'filter' OR NOT s->'tables' @> jsonb_build_array(jsonb_build_array(n.nspname, b.relname))) LOOP
        RAISE 'view % has security_invoker, so agents need % on % too: request both, or make the view without it',
            t.name, t.v, t.below USING ERRCODE = '0A000';
    END LOOP;
    FOR t IN SELECT format('%I.%I', e->>0, e->>1) AS name, p.oid::regprocedure AS called
        FROM jsonb_array_elements(s->'tables') e
        CROSS JOIN LATERAL pawl.defaults_of(format('%I.%I', e->>0, e->>1)::regclass) f
        JOIN pg_depend d ON d.classid = f.class AND d.objid = f.object AND d.refclassid = 'pg_proc'::regclass
        JOIN pg_proc p ON p.oid = d.refobjid
        WHERE s->'verbs' ? 'insert' AND NOT has_function_privilege('public', p.oid, 'EXECUTE') LOOP
        RAISE 'table % has a default that calls function %, which agents may not: '
            'GRANT EXECUTE ON FUNCTION % TO PUBLIC', t.name, t.called, t.called USING ERRCODE = '0A000';
    END LOOP;
END $$;

-- Refuses a shape if PostgreSQL would refuse its logins or show them no row. The error names the object and the remedy.
CREATE OR REPLACE FUNCTION pawl.check_usable(in_shape text, s jsonb) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    t record;
BEGIN
    PERFORM pawl.check_around(s);
    FOR t IN SELECT format('%I.%I', e->>0, e->>1) AS name, v AS verb, e->>0 AS nsp, e->>1 AS rel
        FROM jsonb_array_elements(s->'tables') e, jsonb_array_elements_text(s->'verbs') v LOOP
        IF pawl.rows_visible(in_shape, s, t.nsp, t.rel, t.verb) IS NOT TRUE THEN
            RAISE 'table % has row security and no policy for % that applies to agents: create one for PUBLIC',
                t.name, t.verb USING ERRCODE = '0A000';
        END IF;
    END LOOP;
    FOR t IN SELECT format('%I.%I', e->>0, e->>1) AS name, format('%I.%I', n.nspname, c.relname) AS seq
        FROM jsonb_array_elements(s->'tables') e
        CROSS JOIN LATERAL pawl.sequences_of(format('%I.%I', e->>0, e->>1)::regclass) q
        JOIN pg_class c ON c.oid = q.seq JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE s->'verbs' ? 'insert' AND NOT has_sequence_privilege('public', q.seq, 'USAGE')
            AND NOT has_sequence_privilege(q.seq, 'USAGE WITH GRANT OPTION') LOOP
        RAISE 'table % has a default that uses sequence %, which cannot be granted to agents: '
            'GRANT USAGE ON SEQUENCE % TO pawl_maker WITH GRANT OPTION', t.name, t.seq, t.seq USING ERRCODE = '0A000';
    END LOOP;
    -- file_fdw and its like know no users. So a server counts only if one user has a mapping, or if it is PostgreSQL.
    FOR t IN SELECT format('%I.%I', e->>0, e->>1) AS name, v.srvname FROM jsonb_array_elements(s->'tables') e
        JOIN pg_foreign_table f ON f.ftrelid = format('%I.%I', e->>0, e->>1)::regclass
        JOIN pg_foreign_server v ON v.oid = f.ftserver JOIN pg_foreign_data_wrapper w ON w.oid = v.srvfdw
        WHERE (w.fdwname = 'postgres_fdw' OR EXISTS (SELECT FROM pg_user_mappings m WHERE m.srvid = v.oid))
            AND NOT EXISTS (SELECT FROM pg_user_mappings m WHERE m.srvid = v.oid
                AND (m.umuser = 0 OR s ? 'filter' AND m.umuser = 'pawl_maker'::regrole)) LOOP
        RAISE 'table % is on foreign server %, which has no user mapping for agents: create one for PUBLIC',
            t.name, quote_ident(t.srvname) USING ERRCODE = '0A000';
    END LOOP;
END $$;

-- Returns the group with USAGE on one sequence, or null if PUBLIC has it.
CREATE OR REPLACE FUNCTION pawl.sequence_group(seq regclass) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    grp text;
BEGIN
    IF has_sequence_privilege('public', seq, 'USAGE') THEN
        RETURN NULL;
    END IF;
    SELECT pawl.ensure_group('sequence', 'usage', n.nspname, c.relname) INTO grp
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = seq;
    IF NOT has_sequence_privilege(grp, seq, 'USAGE') THEN
        PERFORM pawl.grant_relation(grp, 'SEQUENCE', seq, 'USAGE');
    END IF;
    RETURN grp;
END $$;

-- Returns the groups with the rights on one table. With a filter the agent has the rights on a view instead, and needs
-- no more than the sequences.
CREATE OR REPLACE FUNCTION pawl.table_groups(s jsonb, nsp text, rel text) RETURNS SETOF text LANGUAGE plpgsql AS $$
DECLARE
    relation regclass := format('%I.%I', nsp, rel)::regclass;
    grp      text;
    verb     text;
BEGIN
    IF s->'verbs' ? 'insert' THEN
        RETURN QUERY SELECT g FROM pawl.sequences_of(relation) q, pawl.sequence_group(q.seq) g WHERE g IS NOT NULL;
    END IF;
    IF s ? 'filter' THEN
        RETURN;
    END IF;
    IF NOT has_schema_privilege('public', nsp, 'USAGE') THEN
        grp := pawl.ensure_group('schema', 'usage', nsp);
        IF NOT has_schema_privilege(grp, nsp, 'USAGE') THEN
            EXECUTE format('GRANT USAGE ON SCHEMA %I TO %I', nsp, grp);
        END IF;
        RETURN NEXT grp;
    END IF;
    FOR verb IN SELECT jsonb_array_elements_text(s->'verbs') LOOP
        grp := pawl.ensure_group('table', verb, nsp, rel);
        IF NOT has_table_privilege(grp, relation, verb) THEN
            PERFORM pawl.grant_relation(grp, 'TABLE', relation, verb);
        END IF;
        RETURN NEXT grp;
    END LOOP;
END $$;

-- The filter is a view with a security barrier, so that the filter applies before any function of the agent sees a row.
-- WITH CHECK OPTION refuses writes of rows outside the filter.
CREATE OR REPLACE FUNCTION pawl.grant_view(in_shape text, grp text, s jsonb, nsp text, rel text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    verbs text := (SELECT string_agg(v, ', ') FROM jsonb_array_elements_text(s->'verbs') v);
BEGIN
    EXECUTE format('CREATE VIEW %s WITH (security_barrier) AS SELECT * FROM %I.%I WHERE %I = %L %s',
        pawl.reach(in_shape, s, nsp, rel), nsp, rel, s#>>'{filter,column}', s#>>'{filter,value}',
        CASE WHEN s->'verbs' <> '["select"]' THEN 'WITH CASCADED CHECK OPTION' END);
    EXECUTE format('GRANT %s ON %s TO %I', verbs, pawl.reach(in_shape, s, nsp, rel), grp);
END $$;

-- Returns the groups of which the group of a shape is a member, and makes them.
CREATE OR REPLACE FUNCTION pawl.shape_groups(s jsonb) RETURNS SETOF text LANGUAGE plpgsql AS $$
DECLARE
    net text := 'pawl_net_' || (s->>'network');
    grp text;
BEGIN
    IF s ? 'network' THEN
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = net) THEN
            EXECUTE format('CREATE ROLE %I NOLOGIN', net);
        END IF;
        RETURN NEXT net;
    END IF;
    IF NOT has_database_privilege('public', current_database(), 'CONNECT') THEN
        grp := pawl.ensure_group('database', 'connect', current_database());
        IF NOT has_database_privilege(grp, current_database(), 'CONNECT') THEN
            EXECUTE format('GRANT CONNECT ON DATABASE %I TO %I', current_database(), grp);
        END IF;
        RETURN NEXT grp;
    END IF;
    RETURN QUERY SELECT g FROM jsonb_array_elements(s->'tables') e, pawl.table_groups(s, e->>0, e->>1) g;
END $$;

CREATE OR REPLACE FUNCTION pawl.build_shape(in_shape text, s jsonb) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    grp     text := 'pawl-shape-' || in_shape;
    wanted  text[];
    present text[];
    t       record;
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = grp) THEN
        EXECUTE format('CREATE ROLE %I NOLOGIN', grp);
    END IF;
    wanted := ARRAY(SELECT DISTINCT g FROM pawl.shape_groups(s) g);
    -- OFFSET 0 as in pawl.inspect.
    present := ARRAY(SELECT g.rolname FROM (SELECT a.roleid FROM pg_auth_members a
            WHERE a.member = (SELECT r.oid FROM pg_roles r WHERE r.rolname = grp) OFFSET 0) a
        CROSS JOIN LATERAL (SELECT r.rolname FROM pg_roles r WHERE r.oid = a.roleid OFFSET 0) g
        WHERE g.rolname LIKE 'pawl%');
    FOR t IN SELECT coalesce(w.name, m.name) AS name, w.name IS NOT NULL AS wanted
        FROM unnest(wanted) w(name) FULL JOIN unnest(present) m(name) USING (name)
        WHERE w.name IS NULL OR m.name IS NULL LOOP
        EXECUTE format(CASE WHEN t.wanted THEN 'GRANT %I TO %I' ELSE 'REVOKE %I FROM %I' END, t.name, grp);
    END LOOP;
    IF s ? 'filter' THEN
        EXECUTE format('DROP SCHEMA IF EXISTS %I CASCADE', 'pawl_' || in_shape);
        EXECUTE format('CREATE SCHEMA %I', 'pawl_' || in_shape);
        EXECUTE format('COMMENT ON SCHEMA %I IS %L', 'pawl_' || in_shape, 'Views of Pawl, which issues logins to '
            'agents. It makes them again when an agent needs them. To alter or drop a table that they read, run before '
            'in the same transaction: SELECT pawl.drop_views(''schema.table'')');
        EXECUTE format('GRANT USAGE ON SCHEMA %I TO %I', 'pawl_' || in_shape, grp);
        FOR t IN SELECT e->>0 AS nsp, e->>1 AS rel FROM jsonb_array_elements(s->'tables') e LOOP
            PERFORM pawl.grant_view(in_shape, grp, s, t.nsp, t.rel);
        END LOOP;
    END IF;
END $$;

-- How many shapes one agent may have at a time. All agents together may have four times as many.
CREATE OR REPLACE FUNCTION pawl.most_shapes() RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT 5000';

-- Refuses another shape for an agent that has too many, unless some of them are idle and can go.
CREATE OR REPLACE FUNCTION pawl.make_room(in_agent text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    idle constant interval := '15 minutes'; -- brokers cache for five minutes which shapes exist
BEGIN
    FOR try IN 1..2 LOOP
        IF (SELECT count(*) FILTER (WHERE s.agent = in_agent) < pawl.most_shapes()
            AND count(*) < 4 * pawl.most_shapes() FROM pawl.shapes s) THEN
            RETURN;
        END IF;
        EXIT WHEN try = 2 OR NOT EXISTS (SELECT FROM pawl.shapes s WHERE s.last_used < now() - idle);
        PERFORM pawl.collect_shapes(idle, '500ms');
    END LOOP;
    RAISE 'agent % has % different sets of tables, verbs, filters and limits, and the database has % for all agents',
        in_agent, (SELECT count(*) FROM pawl.shapes s WHERE s.agent = in_agent), (SELECT count(*) FROM pawl.shapes)
        USING ERRCODE = '53400';
END $$;

-- Waits until no other transaction changes shapes. Concurrent grants on one table fail ("tuple concurrently updated").
CREATE OR REPLACE FUNCTION pawl.lock_shapes() RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    LOCK TABLE pawl.locks IN SHARE ROW EXCLUSIVE MODE;
END $$;

-- Waits for the tables of a shape, before pawl.lock_shapes: an agent that may update a table may also lock it, and must
-- not block shapes of other tables.
CREATE OR REPLACE FUNCTION pawl.lock_tables(s jsonb) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    t record;
BEGIN
    FOR t IN SELECT c.oid, format('%I.%I', e->>0, e->>1) AS name FROM jsonb_array_elements(s->'tables') e
        JOIN pg_namespace n ON n.nspname = e->>0
        JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = e->>1 AND c.relkind IN ('r', 'p', 'v') LOOP
        IF has_table_privilege(t.oid, 'SELECT') THEN
            EXECUTE format('LOCK TABLE ONLY %s IN ACCESS SHARE MODE', t.name);
        ELSE
            EXECUTE format('LOCK TABLE ONLY %s IN ROW EXCLUSIVE MODE', t.name);
        END IF;
    END LOOP;
END $$;

-- Names the transactions that lock the tables of a shape, for an error.
CREATE OR REPLACE FUNCTION pawl.table_holders(s jsonb) RETURNS text LANGUAGE sql AS $$
    SELECT coalesce(string_agg(format('%s of %s.%s by %s', l.mode, n.nspname, c.relname,
            coalesce('login ' || a.usename || ', session ' || l.pid, 'a prepared transaction')), '; '),
        'another shape is being made')
    FROM jsonb_array_elements(s->'tables') e
    JOIN pg_namespace n ON n.nspname = e->>0
    JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = e->>1
    JOIN pg_locks l ON l.relation = c.oid AND l.granted AND l.mode <> 'AccessShareLock' AND l.pid <> pg_backend_pid()
    LEFT JOIN pg_stat_activity a ON a.pid = l.pid
$$;

-- Drops the views of agents that read a table, and returns how many schemas of views it dropped. A view blocks changes
-- of the table. Until the transaction ends no agent gets a new one, and after that each gets one of the changed table.
CREATE OR REPLACE FUNCTION pawl.drop_views(relation regclass) RETURNS int LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET client_min_messages = error SET lock_timeout = '10s' AS $$
DECLARE
    r record;
    n int := 0;
BEGIN
    PERFORM pawl.lock_shapes();
    FOR r IN SELECT DISTINCT s.nspname FROM pawl.views_on(relation) o JOIN pg_class v ON v.oid = o.view
        JOIN pg_namespace s ON s.oid = v.relnamespace
        WHERE s.nspname ~ '^pawl_[0-9a-f]{12}$' AND s.nspowner = 'pawl_maker'::regrole LOOP
        EXECUTE format('DROP SCHEMA %I CASCADE', r.nspname);
        n := n + 1;
    END LOOP;
    RETURN n;
END $$;

-- Returns the shapes, those used last first. Those with a filter have views that block changes of their tables.
CREATE OR REPLACE FUNCTION pawl.list_shapes() RETURNS TABLE (
    shape text, agent text, tables text, verbs text, filter_column text, logins int, last_used timestamptz)
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s' AS $$
    SELECT s.shape, s.agent,
        (SELECT string_agg(format('%I.%I', e->>0, e->>1), ', ') FROM jsonb_array_elements(s.spec::jsonb->'tables') e),
        (SELECT string_agg(v, ', ') FROM jsonb_array_elements_text(s.spec::jsonb->'verbs') v),
        coalesce(s.spec::jsonb#>>'{filter,column}', ''),
        (SELECT count(*)::int FROM pg_auth_members m JOIN pawl.roles l ON l.role = m.member
            WHERE m.roleid = (SELECT g.oid FROM pg_roles g WHERE g.rolname = 'pawl-shape-' || s.shape)),
        s.last_used
    FROM pawl.shapes s ORDER BY s.last_used DESC, s.shape
$$;

-- Returns what Pawl does not promise in this database, one line each.
CREATE OR REPLACE FUNCTION pawl.limits() RETURNS SETOF text LANGUAGE sql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s' AS $$
    SELECT 'tools with the setting network get no secret: pg_hba.conf cannot be read without a superuser'
    WHERE NOT has_function_privilege('pg_hba_file_rules()', 'EXECUTE')
    UNION ALL
    SELECT 'agents can make large objects, which stay for a while after a login has ended'
    WHERE has_function_privilege('public', 'lo_create(oid)', 'EXECUTE')
$$;

-- Makes the group of a shape unless it exists. A call that finds the shape takes no lock.
CREATE OR REPLACE FUNCTION pawl.ensure_shape(in_shape text, in_spec text, agent text DEFAULT '') RETURNS void
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET client_min_messages = error SET lock_timeout = '1s' AS $$
DECLARE
    s     jsonb := pawl.check_spec(in_shape, in_spec);
    known text;
    holds boolean;
BEGIN
    PERFORM pawl.commit_locally();
    PERFORM pawl.check_grantable(s);
    PERFORM pawl.check_usable(in_shape, s);
    IF s ? 'network' THEN
        PERFORM pawl.check_network(s->>'network');
    END IF;
    FOR look IN 1..2 LOOP
        SELECT spec INTO known FROM pawl.shapes WHERE shape = in_shape;
        IF known <> in_spec THEN
            RAISE 'shape % belongs to another specification', in_shape USING ERRCODE = '22023';
        END IF;
        holds := known IS NOT NULL AND pawl.shape_holds(in_shape, s);
        IF holds AND pawl.columns_hold(in_shape, s) THEN
            UPDATE pawl.shapes SET last_used = now()
            WHERE shape = in_shape AND last_used < now() - interval '1 minute';
            RETURN;
        END IF;
        IF look = 1 THEN
            PERFORM pawl.lock_tables(s);
            PERFORM pawl.lock_shapes();
        END IF;
    END LOOP;
    IF known IS NULL THEN
        PERFORM pawl.make_room(ensure_shape.agent);
    END IF;
    IF holds THEN -- but for new columns: those wait until no agent reads the view
        BEGIN
            PERFORM set_config('lock_timeout', '100ms', true);
            PERFORM pawl.build_shape(in_shape, s);
        EXCEPTION WHEN lock_not_available THEN
        END;
    ELSE
        PERFORM pawl.build_shape(in_shape, s);
    END IF;
    INSERT INTO pawl.shapes (shape, spec, agent) VALUES (in_shape, in_spec, left(ensure_shape.agent, 2048))
    ON CONFLICT (shape) DO UPDATE SET last_used = now();
EXCEPTION WHEN lock_not_available THEN
    RAISE 'shape % waited more than a second for a lock: %', in_shape, pawl.table_holders(s) USING ERRCODE = '55P03';
END $$;

-- ---------------------------------------------------------------- logins, made and ended for Vault

-- Accepts only a SCRAM verifier as a password. The password itself never reaches this server, so it cannot be in its
-- log.
CREATE OR REPLACE FUNCTION pawl.check_verifier(verifier text, expires timestamptz, longest interval)
RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF (verifier ~ '^SCRAM-SHA-256\$[0-9]{4,7}:[A-Za-z0-9+/]{8,64}={0,2}\$[A-Za-z0-9+/]{43}=:[A-Za-z0-9+/]{43}=$')
        IS NOT TRUE THEN
        RAISE 'the password must be a SCRAM-SHA-256 verifier' USING ERRCODE = '22023',
            HINT = 'Set password_authentication=scram-sha-256 on the connection in Vault.';
    END IF;
    IF (expires > now() AND expires <= now() + longest) IS NOT TRUE THEN
        RAISE 'a login must expire within %', longest USING ERRCODE = '22023';
    END IF;
END $$;

-- Vault's creation statement calls this. The login is a member of its shape's group and holds no rights of its own. Its
-- settings protect the database from accidents and are no security boundary.
CREATE OR REPLACE FUNCTION pawl.grant_login(login text, verifier text, expires timestamptz) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan SET lock_timeout = '2s' AS $$
DECLARE
    in_shape text := substr(login, 33, 12);
    s        jsonb;
BEGIN
    PERFORM pawl.commit_locally();
    IF pawl.is_login(login) IS NOT TRUE THEN
        RAISE 'malformed name of an agent''s login' USING ERRCODE = '22023';
    END IF;
    PERFORM pawl.check_verifier(verifier, expires, interval '1 hour');
    -- The key share lock prevents pawl.collect from dropping the shape before this transaction commits.
    SELECT spec::jsonb INTO s FROM pawl.shapes WHERE shape = in_shape FOR KEY SHARE;
    IF s IS NULL THEN
        RAISE 'shape % does not exist', in_shape USING ERRCODE = '22023';
    END IF;
    INSERT INTO pawl.logins (grant_id, name, server, timeline)
    VALUES (substr(login, 6, 26), login, pawl.server_id(), pawl.timeline());
    EXECUTE format('CREATE ROLE %I LOGIN CONNECTION LIMIT %s PASSWORD %L VALID UNTIL %L IN ROLE %I',
        login, (s->>'connections')::int, verifier, expires, 'pawl-shape-' || in_shape);
    EXECUTE format('ALTER ROLE %I SET statement_timeout = %L', login, s->>'statement_ms');
    EXECUTE format('ALTER ROLE %I SET idle_in_transaction_session_timeout = %L', login, s->>'idle_ms');
    IF s ? 'filter' THEN
        EXECUTE format('ALTER ROLE %I SET search_path = %I', login, 'pawl_' || in_shape);
    END IF;
    UPDATE pawl.logins SET role = (SELECT oid FROM pg_roles WHERE rolname = login)
    WHERE grant_id = substr(login, 6, 26);
END $$;

-- Returns the given roles that a session or a prepared transaction of their own may have locked. A login may alter its
-- own password. While that transaction is open, PostgreSQL lets no other transaction alter the login.
CREATE OR REPLACE FUNCTION pawl.self_locked(roles oid[]) RETURNS oid[] LANGUAGE plpgsql AS $$
BEGIN
    RETURN ARRAY(
        SELECT a.usesysid FROM pg_locks l JOIN pg_stat_activity a USING (pid)
        WHERE l.relation IN ('pg_authid'::regclass, 'pg_auth_members'::regclass) AND l.granted
            AND l.mode <> 'AccessShareLock' AND a.usesysid = ANY (roles)
        UNION SELECT x.ownerid FROM pg_prepared_xact() x WHERE x.ownerid = ANY (roles));
END $$;

-- Returns the psql statement by which a superuser ends a prepared transaction. It does not contain the transaction's
-- identifier, since the agent chose that text.
CREATE OR REPLACE FUNCTION pawl.rollback_hint(transaction xid, database name) RETURNS text LANGUAGE sql IMMUTABLE AS $$
    SELECT format('in database %I: SELECT format(''ROLLBACK PREPARED %%L'', gid) FROM pg_prepared_xacts '
        'WHERE transaction = ''%s'' \gexec', database, transaction)
$$;

-- Names the transactions that may have locked a login, for an error.
CREATE OR REPLACE FUNCTION pawl.holders(login text) RETURNS text LANGUAGE sql AS $$
    SELECT coalesce(string_agg(h.holder, ', '), 'another transaction') FROM (
        SELECT 'prepared transaction ' || x.transaction
        FROM pg_prepared_xact() x JOIN pg_roles r ON r.oid = x.ownerid WHERE r.rolname = login
        UNION ALL
        SELECT 'its own session ' || pid FROM pg_stat_activity WHERE usename = login) h(holder)
$$;

-- Returns the prepared transactions of the given grants' logins in all databases of the cluster. A prepared transaction
-- outlives its session, keeps its locks and can be committed later. A row without a grant_id belongs to a group of
-- agents: any of its logins can have made it, after SET ROLE. A row without an owner belongs to a login that was dropped
-- or renamed, which is not lent: a renamed one can have other rights.
CREATE OR REPLACE FUNCTION pawl.prepared(grants text[]) RETURNS TABLE (grant_id text, owner name, hint text)
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s' AS $$
    SELECT l.grant_id, r.rolname, pawl.rollback_hint(x.transaction, d.datname) FROM pg_prepared_xact() x
    JOIN pg_database d ON d.oid = x.dbid JOIN pawl.logins l ON l.role = x.ownerid
    LEFT JOIN pg_roles r ON r.oid = x.ownerid AND r.rolname = l.name
    WHERE l.server = pawl.server_id()
        AND (grants IS NULL OR l.grant_id IN (SELECT unnest(grants)))
    UNION ALL
    SELECT NULL, r.rolname, pawl.rollback_hint(x.transaction, d.datname) FROM pg_prepared_xact() x
    JOIN pg_database d ON d.oid = x.dbid JOIN pg_roles r ON r.oid = x.ownerid
    WHERE r.rolname ~ '^pawl_net_[a-z][a-z0-9_]*$'
        OR EXISTS (SELECT FROM pawl.shapes s WHERE r.rolname = 'pawl-shape-' || s.shape)
        OR EXISTS (SELECT FROM pawl.groups g WHERE r.rolname = g.name)
$$;

-- Removes LOGIN and the rights from the given logins. Returns how many are done, and names the first obstacle.
--
-- Once this commits, an open session is refused its next statement, but not every one. A statement that was prepared in
-- the open transaction, an open cursor, a running DO block, and all statements after SET ROLE to the group continue to
-- read until the session ends. So terminate the sessions right after the commit.
--
-- Each login has a subtransaction of its own and is waited for at most a tenth of a second, so that no login holds up
-- the others. After the first such wait the others are hardly waited for. A login that cannot be altered loses its
-- rights at least. For the planner settings see pawl.inspect.
CREATE OR REPLACE FUNCTION pawl.disable(names text[], OUT done int, OUT obstacle text) LANGUAGE plpgsql
SET enable_seqscan = off SET jit = off SET lock_timeout = '100ms' AS $$
DECLARE
    r record;
BEGIN
    done := 0;
    FOR r IN SELECT p.*, (SELECT string_agg(quote_ident(g.rolname), ', ') FROM (
            SELECT m.roleid FROM pg_auth_members m WHERE m.member = p.role OFFSET 0) m
            CROSS JOIN LATERAL (SELECT g.rolname FROM pg_roles g WHERE g.oid = m.roleid OFFSET 0) g
            WHERE g.rolname LIKE 'pawl-%') AS groups
        FROM unnest(names) n CROSS JOIN LATERAL ( -- not pawl.roles, which lacks a login that was renamed
            SELECT p.rolname AS name, p.oid AS role, p.rolcanlogin FROM pg_roles p WHERE p.rolname = n OFFSET 0) p LOOP
        BEGIN
            IF r.rolcanlogin THEN
                EXECUTE format('ALTER ROLE %I NOLOGIN', r.name);
            END IF;
            IF r.groups IS NOT NULL THEN
                EXECUTE format('REVOKE %s FROM %I', r.groups, r.name);
            END IF;
            done := done + 1;
        EXCEPTION WHEN OTHERS THEN
            obstacle := coalesce(obstacle, format('login %s: %s (%s)', r.name, SQLERRM, pawl.holders(r.name)));
            PERFORM set_config('lock_timeout', '5ms', true);
            BEGIN
                IF r.groups IS NOT NULL THEN
                    EXECUTE format('REVOKE %s FROM %I', r.groups, r.name);
                END IF;
            EXCEPTION WHEN OTHERS THEN -- the obstacle is named already
            END;
        END;
    END LOOP;
END $$;

-- Terminates the sessions of roles, of dropped ones too, and returns how many there were.
CREATE OR REPLACE FUNCTION pawl.hang_up_once(roles oid[]) RETURNS int LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_stat_clear_snapshot(); -- otherwise every read in a transaction returns the first snapshot
    RETURN (SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usesysid = ANY (roles));
END $$;

-- Terminates the sessions of roles and waits for their end, at most two seconds. Returns true if none is left.
CREATE OR REPLACE FUNCTION pawl.hang_up(roles oid[]) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    patience timestamptz := clock_timestamp() + interval '2 seconds';
    n        int;
BEGIN
    LOOP
        n := pawl.hang_up_once(roles);
        IF n = 0 OR clock_timestamp() > patience THEN
            RETURN n = 0;
        END IF;
        PERFORM pg_sleep(0.01);
    END LOOP;
END $$;

-- Drops a role that can no longer log in and has no session. If that fails the role remains, without LOGIN and without
-- rights: an error here would roll that back. It fails for a role that owns objects in another database, and for one
-- that another transaction has locked.
CREATE OR REPLACE FUNCTION pawl.drop_role(name text) RETURNS boolean LANGUAGE plpgsql SET lock_timeout = '100ms' AS $$
BEGIN
    IF EXISTS (SELECT FROM pg_shdepend d WHERE d.refclassid = 'pg_authid'::regclass
        AND d.refobjid = (SELECT r.oid FROM pg_roles r WHERE r.rolname = drop_role.name)) THEN
        EXECUTE format('GRANT %I TO pawl_maker', name); -- DROP OWNED needs the rights of the role
        EXECUTE format('DROP OWNED BY %I CASCADE', name);
    END IF;
    EXECUTE format('DROP ROLE %I', name);
    RETURN true;
EXCEPTION WHEN OTHERS THEN
    RETURN false;
END $$;

-- Drops at most the given number of objects that a role owns in this database, and returns how many.
CREATE OR REPLACE FUNCTION pawl.drop_some(name text, most int) RETURNS int LANGUAGE plpgsql
SET lock_timeout = '100ms' AS $$
DECLARE
    o       record;
    dropped int := 0;
BEGIN
    EXECUTE format('GRANT %I TO pawl_maker', name);
    FOR o IN SELECT d.classid, d.objid, i.type, i.identity FROM pg_shdepend d
        CROSS JOIN LATERAL pg_identify_object(d.classid, d.objid, 0) i
        WHERE d.refclassid = 'pg_authid'::regclass AND d.deptype = 'o'
            AND d.refobjid = (SELECT r.oid FROM pg_roles r WHERE r.rolname = drop_some.name)
            AND d.dbid = (SELECT b.oid FROM pg_database b WHERE b.datname = current_database()) LIMIT most LOOP
        BEGIN
            IF o.classid = 'pg_largeobject'::regclass THEN
                PERFORM lo_unlink(o.objid);
            ELSIF o.identity IS NOT NULL THEN -- null: it went with another one
                EXECUTE format('DROP %s IF EXISTS %s CASCADE', o.type, o.identity);
            END IF;
            dropped := dropped + 1;
        EXCEPTION WHEN OTHERS THEN
            EXIT WHEN SQLSTATE = '53200'; -- the server has no room for more locks
        END;
    END LOOP;
    EXECUTE format('REVOKE %I FROM pawl_maker', name);
    RETURN dropped;
EXCEPTION WHEN OTHERS THEN
    RETURN 0;
END $$;

-- Drops logins that can no longer log in and have no session, with the objects that they own. Returns how many, and of
-- how many objects it dropped a part only. A transaction needs a lock for each object that it drops, and the server has
-- room for some thousands. So this drops at most 500 objects, and it stops after two seconds.
CREATE OR REPLACE FUNCTION pawl.drop_logins(names text[], OUT dropped int, OUT objects int) LANGUAGE plpgsql
SET enable_seqscan = off AS $$
DECLARE
    patience timestamptz := clock_timestamp() + interval '2 seconds';
    room     int := 500;
    owned    int;
    r        record;
BEGIN
    dropped := 0;
    objects := 0;
    PERFORM pg_stat_clear_snapshot();
    FOR r IN SELECT p.name, p.role FROM pawl.roles p WHERE p.name = ANY (names) AND NOT p.rolcanlogin
        AND NOT EXISTS (SELECT FROM pg_stat_activity a WHERE a.usesysid = p.role) LOOP
        EXIT WHEN clock_timestamp() > patience;
        -- Checked after the sessions, since a session can prepare a transaction and end. Without its owner only a
        -- superuser could end it.
        CONTINUE WHEN EXISTS (SELECT FROM pg_prepared_xact() x WHERE x.ownerid = r.role);
        owned := (SELECT count(*) FROM (SELECT FROM pg_shdepend d
            WHERE d.refclassid = 'pg_authid'::regclass AND d.refobjid = r.role LIMIT room + 1) d);
        IF owned > room THEN
            objects := pawl.drop_some(r.name, room);
            EXIT WHEN objects > 0;
        ELSE
            room := room - owned;
            dropped := dropped + pawl.drop_role(r.name)::int;
        END IF;
    END LOOP;
END $$;

-- Vault's revocation statement calls this. The order is NOLOGIN, sessions, objects, role, since DROP ROLE alone leaves
-- sessions open. A login that has ended is no error. A login of which this server has neither role nor record is one:
-- Vault's connection points at another server than before, and the login may live at that one.
--
-- Vault makes and ends the logins of one database one at a time, so the time of this call limits the revocation of
-- thousands. Planning it anew for each call took half of it, and scans of all roles most of the rest: see pawl.inspect.
--
-- If a login resists, this ends its sessions and tries once more. One that resists still has no rights, and
-- pawl.inspect shows that it can log in. A login that cannot be dropped at once, because it owns thousands of objects,
-- remains for pawl.collect, without LOGIN and without rights.
CREATE OR REPLACE FUNCTION pawl.end_logins(names text[]) RETURNS int LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET jit = off
SET client_min_messages = error SET lock_timeout = '2s' AS $$
DECLARE
    here    oid[];
    resists text;
BEGIN
    PERFORM pawl.commit_locally();
    IF names IS NULL OR EXISTS (SELECT FROM unnest(names) n WHERE pawl.is_login(n) IS NOT TRUE) THEN
        RAISE 'malformed name of an agent''s login' USING ERRCODE = '22023';
    END IF;
    PERFORM FROM pawl.logins WHERE grant_id IN (SELECT substr(n, 6, 26) FROM unnest(names) n)
    ORDER BY grant_id FOR UPDATE;
    here := ARRAY(SELECT role FROM pawl.roles WHERE name = ANY (names));
    IF cardinality(names) = 1 AND cardinality(here) = 0 AND NOT pawl.has_record(names[1]) THEN
        RAISE 'this server has no record of login %: it was made elsewhere, or ended more than a week ago', names[1]
            USING ERRCODE = '02000', HINT = 'Point the connection in Vault at the server that made the login.';
    END IF;
    PERFORM pawl.hang_up_once(pawl.self_locked(here));
    SELECT d.obstacle INTO resists FROM pawl.disable(names) d;
    UPDATE pawl.logins l SET ended = now() FROM unnest(names) n
    WHERE l.grant_id = substr(n, 6, 26) AND l.ended IS NULL;
    IF pawl.hang_up(here) AND resists IS NOT NULL THEN
        PERFORM pawl.disable(names);
    END IF;
    RETURN (SELECT d.dropped FROM pawl.drop_logins(names) d);
END $$;

-- ---------------------------------------------------------------- the broker's own logins

CREATE OR REPLACE FUNCTION pawl.is_service(login text) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT login ~ '^pawl-[A-Za-z0-9][A-Za-z0-9._-]{0,47}-[A-Za-z0-9]{8}$'
        AND login !~ '^pawl-(gr[0-9a-z]{24}|shape|table|sequence|schema|database)-'
$$;

-- A step's token cannot make a service login: is_service refuses a name that begins with a grant id.
CREATE OR REPLACE FUNCTION pawl.grant_service_login(login text, verifier text, expires timestamptz, duty text)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s' AS $$
BEGIN
    PERFORM pawl.commit_locally();
    IF pawl.is_service(login) IS NOT TRUE OR (duty IN ('shaper', 'revoker')) IS NOT TRUE THEN
        RAISE 'malformed name or duty of a service login' USING ERRCODE = '22023';
    END IF;
    PERFORM pawl.check_verifier(verifier, expires, interval '25 hours');
    EXECUTE format('CREATE ROLE %I LOGIN CONNECTION LIMIT 16 PASSWORD %L VALID UNTIL %L IN ROLE %I',
        login, verifier, expires, 'pawl_' || duty);
END $$;

CREATE OR REPLACE FUNCTION pawl.end_service_login(login text) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET client_min_messages = error SET lock_timeout = '2s' AS $$
DECLARE
    known oid := (SELECT r.oid FROM pg_roles r WHERE r.rolname = login AND EXISTS (
        SELECT FROM pg_auth_members m JOIN pg_roles g ON g.oid = m.roleid
        WHERE m.member = r.oid AND g.rolname IN ('pawl_shaper', 'pawl_revoker')));
BEGIN
    PERFORM pawl.commit_locally();
    IF pawl.is_service(login) IS NOT TRUE THEN
        RAISE 'malformed name of a service login' USING ERRCODE = '22023';
    END IF;
    IF known IS NULL THEN
        RETURN false;
    END IF;
    EXECUTE format('ALTER ROLE %I NOLOGIN', login);
    RETURN pawl.hang_up(ARRAY[known]) AND pawl.drop_role(login);
END $$;

-- ---------------------------------------------------------------- severing and proving

CREATE OR REPLACE FUNCTION pawl.check_grants(grants text[]) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF grants IS NULL OR EXISTS (SELECT FROM unnest(grants) g
        WHERE (g ~ '^gr[0-9a-hjkmnp-tv-z]{24}$') IS NOT TRUE) THEN
        RAISE 'malformed list of grant ids' USING ERRCODE = '22023';
    END IF;
END $$;

-- Returns the state of the given grants' logins. If grants is null, it returns all that were made in this database
-- (roles belong to the whole cluster). It counts a session even if its role was dropped.
--
-- It looks up each given grant over an index; OFFSET 0 stops the planner from reordering that. The plan is made anew
-- for the number of grants, without sequential scans. Roles come and go by thousands between two runs of ANALYZE. If
-- the statistics say that a table is empty, the planner scans it once per role.
CREATE OR REPLACE FUNCTION pawl.inspect(grants text[]) RETURNS TABLE (
    grant_id text, name text, role oid, can_login boolean, in_group boolean, valid_until timestamptz, sessions int)
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan SET enable_seqscan = off SET jit = off
SET lock_timeout = '2s' AS $$
BEGIN
    PERFORM pg_stat_clear_snapshot();
    RETURN QUERY
    WITH busy AS (SELECT usesysid, count(*)::int AS n FROM pg_stat_activity GROUP BY usesysid),
    wanted AS (SELECT DISTINCT unnest(grants) AS id),
    known AS (
        SELECT r.* FROM wanted w CROSS JOIN LATERAL (
            SELECT r.grant_id, r.name::text, r.role, r.rolcanlogin, r.rolvaliduntil FROM pawl.roles r
            WHERE r.name >= 'pawl-' || w.id || '-' AND r.name < 'pawl-' || w.id || '.' -- '.' follows '-' in order
            OFFSET 0) r
        UNION ALL
        SELECT r.grant_id, r.name::text, r.role, r.rolcanlogin, r.rolvaliduntil FROM pawl.roles r
        WHERE grants IS NULL AND EXISTS (SELECT FROM pawl.logins l WHERE l.grant_id = r.grant_id)
        UNION ALL
        SELECT l.grant_id, l.name, l.role, false, NULL FROM busy b JOIN pawl.logins l ON l.role = b.usesysid
        WHERE NOT EXISTS (SELECT FROM pg_roles p WHERE p.oid = l.role)
            AND (grants IS NULL OR l.grant_id IN (SELECT w.id FROM wanted w)))
    SELECT k.grant_id, k.name, k.role, k.rolcanlogin,
        EXISTS (SELECT FROM (SELECT m.roleid FROM pg_auth_members m WHERE m.member = k.role OFFSET 0) m
            WHERE (SELECT g.rolname LIKE 'pawl-%' FROM pg_roles g WHERE g.oid = m.roleid)),
        k.rolvaliduntil, coalesce(b.n, 0)
    FROM known k LEFT JOIN busy b ON b.usesysid = k.role;
    -- Logins that were renamed. They have their passwords still.
    RETURN QUERY
    SELECT l.grant_id, p.rolname::text, l.role, p.rolcanlogin, EXISTS (SELECT FROM pg_auth_members m
            JOIN pg_roles g ON g.oid = m.roleid WHERE m.member = l.role AND g.rolname LIKE 'pawl-%'),
        p.rolvaliduntil, (SELECT count(*)::int FROM pg_stat_activity a WHERE a.usesysid = l.role)
    FROM (SELECT l.grant_id, l.name, l.role FROM (SELECT DISTINCT unnest(grants) AS id) w CROSS JOIN LATERAL (
            SELECT l.* FROM pawl.logins l
            WHERE l.grant_id = w.id COLLATE "default" AND l.server = pawl.server_id() OFFSET 0) l
        UNION ALL
        SELECT l.grant_id, l.name, l.role FROM pawl.logins l
        WHERE grants IS NULL AND l.server = pawl.server_id()) l
    CROSS JOIN LATERAL (SELECT p.rolname, p.rolcanlogin, p.rolvaliduntil FROM pg_roles p
        WHERE p.oid = l.role OFFSET 0) p WHERE p.rolname <> l.name;
END $$;

-- Returns those of the given logins that this server made since it was last promoted. It knows each for a week after its
-- end. The server that it followed before, or was copied from, may take the earlier ones. For the planner settings see
-- pawl.inspect.
CREATE OR REPLACE FUNCTION pawl.recorded(names text[]) RETURNS SETOF text LANGUAGE sql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off SET lock_timeout = '2s' AS $$
    SELECT n FROM (SELECT pawl.server_id() AS id, pawl.timeline() AS timeline OFFSET 0) here,
    unnest(names) n CROSS JOIN LATERAL (
        SELECT l.server, l.timeline FROM pawl.logins l WHERE l.grant_id = substr(n, 6, 26)
            AND coalesce(l.name, n) = n OFFSET 0) l
    WHERE l.server = here.id AND l.timeline = here.timeline
$$;

-- Lets this server answer for the logins from before its last promotion, and for the barred grants: the server before
-- may have made logins for them that never came here. A DBA calls it once the server that this one followed, or was
-- copied from, has stopped for good.
CREATE OR REPLACE FUNCTION pawl.adopt_logins() RETURNS void LANGUAGE sql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s' AS $$
    UPDATE pawl.logins SET server = pawl.server_id(), timeline = pawl.timeline()
    WHERE server = pawl.server_id() OR name IS NULL
$$;

-- Returns those of the given grants that have had a login or were barred. They can get no other login.
CREATE OR REPLACE FUNCTION pawl.known(grants text[]) RETURNS SETOF text LANGUAGE sql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off SET lock_timeout = '2s' AS $$
    SELECT l.grant_id FROM pawl.logins l WHERE l.grant_id IN (SELECT unnest(grants))
$$;

-- Severs the given grants. Call it until severed, passed_over, sessions and prepared are all zero: a later call finds a
-- session that began to log in before the commit. prepared counts the transactions that pawl.prepared returns: no
-- function can roll one back, so the caller does, with pawl.lend. It passes over a login that another transaction is
-- ending, or that resists, so that none can block the rest. obstacle names the first that resists.
--
-- A call first terminates the sessions of logins that an earlier call disabled. Then it disables the others. It does
-- not terminate their sessions: the server takes about a second to end a thousand sessions, and before the commit their
-- users could log in again and continue to read. A login that has locked itself is the exception, since its sessions
-- must end first. It has its turn in a call that disables no other.
--
-- The processes in starting may have been accepted before the commit. They are in no list of sessions yet, but hold a
-- transaction: InitPostgres begins it before authentication. Once these processes have ended or become sessions, a call
-- that counts nothing is the last.
CREATE OR REPLACE FUNCTION pawl.sever(
    grants text[], OUT severed int, OUT passed_over int, OUT sessions int, OUT starting int[], OUT prepared int,
    OUT obstacle text)
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_custom_plan SET enable_seqscan = off SET jit = off
SET client_min_messages = error SET lock_timeout = '2s' AS $$
DECLARE
    locked text[];
    dead   oid[];
    alive  oid[];
    names  text[];
    held   oid[];
    ours   text[];
    easy   text[];
BEGIN
    PERFORM pawl.check_grants(grants);
    PERFORM pawl.commit_locally();
    -- Two transactions that alter one role conflict, so this locks the rows first.
    locked := ARRAY(SELECT l.grant_id FROM pawl.logins l WHERE l.grant_id IN (SELECT unnest(grants))
        FOR UPDATE SKIP LOCKED);
    SELECT array_agg(i.role) FILTER (WHERE NOT i.can_login AND NOT i.in_group),
        coalesce(array_agg(i.role) FILTER (WHERE i.can_login OR i.in_group), '{}'),
        coalesce(array_agg(i.name) FILTER (WHERE i.can_login OR i.in_group), '{}')
    INTO dead, alive, names FROM pawl.inspect(grants) i;
    severed := 0;
    IF cardinality(alive) > 0 THEN
        held := pawl.self_locked(alive);
        sessions := pawl.hang_up_once(dead || held);
        ours := ARRAY(SELECT a.n FROM unnest(names) a(n) WHERE substr(a.n, 6, 26) IN (SELECT unnest(locked))
            OR NOT EXISTS (SELECT FROM pawl.logins l WHERE l.grant_id = substr(a.n, 6, 26)));
        easy := ARRAY(SELECT a.n FROM unnest(names, alive) a(n, o) WHERE a.o <> ALL (held)
            AND a.n IN (SELECT unnest(ours)));
        SELECT d.done, d.obstacle INTO severed, obstacle
        FROM pawl.disable(CASE WHEN cardinality(easy) > 0 THEN easy ELSE ours END) d;
    END IF;
    passed_over := cardinality(alive) - severed;
    IF severed > 0 THEN
        starting := '{}';
        prepared := 0;
        RETURN;
    END IF;
    PERFORM pg_stat_clear_snapshot();
    starting := ARRAY(SELECT pid FROM pg_locks WHERE locktype = 'virtualxid' AND granted
        EXCEPT SELECT pid FROM pg_stat_activity WHERE usesysid IS NOT NULL OR datid IS NOT NULL);
    -- Sessions are counted last, so that they include every process that started up in between. A session of a dropped
    -- role that inspect did not see yet is found by the oid of that role.
    dead := dead || alive || ARRAY(SELECT l.role FROM pawl.logins l WHERE l.grant_id IN (SELECT unnest(grants))
        AND (SELECT p.oid FROM pg_roles p WHERE p.oid = l.role) IS NULL);
    sessions := pawl.hang_up_once(dead);
    SELECT count(*), coalesce(obstacle, 'prepared transaction; ' || min(p.hint)) INTO prepared, obstacle
    FROM pawl.prepared(grants) p;
END $$;

-- Makes the calling revoker a member of each role that owns a prepared transaction of the given grants, and returns
-- the statements to run. Only the owner may roll it back, in its own database and not in a function. An owner is lent
-- once it has no rights. A group of agents has rights: it is lent only while it owns a prepared transaction.
-- pawl.give_back ends it.
CREATE OR REPLACE FUNCTION pawl.lend(grants text[]) RETURNS TABLE (database name, set_role text, statement text)
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET client_min_messages = error SET lock_timeout = '100ms' AS $$
DECLARE
    o record;
BEGIN
    PERFORM pawl.check_grants(grants);
    PERFORM pawl.commit_locally();
    FOR o IN SELECT DISTINCT p.owner FROM pawl.prepared(grants) p WHERE p.owner IS NOT NULL AND (p.grant_id IS NULL
        OR NOT EXISTS (SELECT FROM pawl.inspect(ARRAY[p.grant_id]) i WHERE i.in_group)) LOOP
        BEGIN
            EXECUTE format('GRANT %I TO %I', o.owner, session_user);
        EXCEPTION WHEN OTHERS THEN -- the caller tries again
            CONTINUE;
        END;
        RETURN QUERY SELECT d.datname, format('SET ROLE %I', o.owner), format('ROLLBACK PREPARED %L', x.gid)
        FROM pg_prepared_xact() x JOIN pg_database d ON d.oid = x.dbid JOIN pg_roles r ON r.oid = x.ownerid
        WHERE r.rolname = o.owner;
    END LOOP;
END $$;

-- Takes back what pawl.lend lent to the calling revoker.
CREATE OR REPLACE FUNCTION pawl.give_back() RETURNS void LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET client_min_messages = error SET lock_timeout = '2s' AS $$
DECLARE
    r record;
BEGIN
    PERFORM pawl.commit_locally();
    FOR r IN SELECT g.rolname FROM pg_auth_members m JOIN pg_roles g ON g.oid = m.roleid
        JOIN pg_roles u ON u.oid = m.member
        WHERE u.rolname = session_user AND g.rolname NOT IN ('pawl_revoker', 'pawl_shaper') LOOP
        EXECUTE format('REVOKE %I FROM %I', r.rolname, session_user);
    END LOOP;
END $$;

-- Terminates the sessions of grants at a hot standby, where pawl.sever cannot run. alive counts the logins that can log
-- in there or have rights, since the standby has not replayed their end. Call it until all counts are zero, as
-- pawl.sever.
CREATE OR REPLACE FUNCTION pawl.cut(grants text[], OUT alive int, OUT sessions int, OUT starting int[])
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_custom_plan SET enable_seqscan = off SET jit = off
SET lock_timeout = '2s' AS $$
DECLARE
    roles oid[];
BEGIN
    PERFORM pawl.check_grants(grants);
    SELECT array_agg(i.role), count(*) FILTER (WHERE i.can_login OR i.in_group) INTO roles, alive
    FROM pawl.inspect(grants) i;
    PERFORM pg_stat_clear_snapshot();
    -- The process that replays holds a transaction for as long as it lives. Before version 18 the list of sessions
    -- shows no process that is starting up.
    starting := ARRAY(SELECT pid FROM pg_locks WHERE locktype = 'virtualxid' AND granted
        EXCEPT SELECT pid FROM pg_stat_activity WHERE usesysid IS NOT NULL OR datid IS NOT NULL
            OR current_setting('server_version_num')::int < 180000);
    roles := roles || ARRAY(SELECT l.role FROM pawl.logins l WHERE l.grant_id IN (SELECT unnest(grants))
        AND (SELECT p.oid FROM pg_roles p WHERE p.oid = l.role) IS NULL);
    sessions := pawl.hang_up_once(roles);
END $$;

-- Fails at a server that is no primary any more. Its state proves nothing: the primary may have another one.
CREATE OR REPLACE FUNCTION pawl.check_primary() RETURNS void LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s' AS $$
BEGIN
    IF pg_is_in_recovery() OR current_setting('transaction_read_only')::boolean THEN
        RAISE 'this server is read only' USING ERRCODE = '25006';
    END IF;
END $$;

-- Returns the identity of this server, whether it is a standby, its timeline unless it is one, how far it has written or
-- replayed, and when it was started. A standby has the identity of its primary.
CREATE OR REPLACE FUNCTION pawl.position(
    OUT server bigint, OUT standby boolean, OUT timeline text, OUT lsn pg_lsn, OUT started timestamptz)
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s' AS $$
    SELECT pawl.server_id(), pg_is_in_recovery(), pawl.timeline(),
        CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END,
        pg_postmaster_start_time()
$$;

-- Bars grants, so that they can never get a credential, and waits for mints in flight. Returns how many of the grants
-- can log in nevertheless, because their credential was made just before.
CREATE OR REPLACE FUNCTION pawl.bar(grants text[]) RETURNS int LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s' AS $$
BEGIN
    PERFORM pawl.commit_locally();
    PERFORM pawl.check_grants(grants);
    INSERT INTO pawl.logins (grant_id, ended) SELECT g, now() FROM unnest(grants) g ORDER BY g
    ON CONFLICT (grant_id) DO NOTHING;
    RETURN (SELECT count(*) FROM pawl.roles r WHERE r.rolcanlogin AND r.grant_id IN (SELECT unnest(grants)));
END $$;

-- Drops the logins of grants and returns how many.
CREATE OR REPLACE FUNCTION pawl.remove(grants text[]) RETURNS int LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s' AS $$
BEGIN
    PERFORM pawl.check_grants(grants);
    RETURN pawl.end_logins(ARRAY(SELECT r.name::text FROM pawl.roles r WHERE r.grant_id IN (SELECT unnest(grants))));
END $$;

-- Removes shapes that were unused for the given time and have no member, and groups that have none. It stops after the
-- given time, and does nothing while another transaction makes a shape.
CREATE OR REPLACE FUNCTION pawl.collect_shapes(unused interval, atmost interval) RETURNS int LANGUAGE plpgsql AS $$
DECLARE
    patience timestamptz := clock_timestamp() + atmost;
    shapes   int := 0;
    r        record;
BEGIN
    BEGIN
        LOCK TABLE pawl.locks IN SHARE ROW EXCLUSIVE MODE NOWAIT;
    EXCEPTION WHEN lock_not_available THEN
        RETURN 0;
    END;
    FOR r IN SELECT s.shape, 'pawl-shape-' || s.shape AS grp FROM pawl.shapes s
        WHERE s.last_used < now() - unused AND NOT EXISTS (SELECT FROM pg_auth_members m
            JOIN pg_roles g ON g.oid = m.roleid JOIN pawl.roles l ON l.role = m.member
            WHERE g.rolname = 'pawl-shape-' || s.shape)
        ORDER BY random() LIMIT 1000
        FOR UPDATE SKIP LOCKED LOOP
        BEGIN
            EXECUTE format('DROP SCHEMA IF EXISTS %I CASCADE', 'pawl_' || r.shape);
            IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = r.grp) OR pawl.drop_role(r.grp) THEN
                DELETE FROM pawl.shapes WHERE shape = r.shape;
                shapes := shapes + 1;
            END IF;
        EXCEPTION WHEN OTHERS THEN -- it stays; the next call tries it again
        END;
        EXIT WHEN clock_timestamp() > patience;
    END LOOP;
    FOR r IN SELECT g.name FROM pawl.groups g WHERE NOT EXISTS (
        SELECT FROM pg_auth_members m JOIN pg_roles p ON p.oid = m.roleid WHERE p.rolname = g.name) LOOP
        EXIT WHEN clock_timestamp() > patience;
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = r.name) OR pawl.drop_role(r.name) THEN
            DELETE FROM pawl.groups WHERE name = r.name;
        END IF;
    END LOOP;
    -- Networks without a member. (The member can be a shape of another database.)
    FOR r IN SELECT n.rolname FROM pg_roles n WHERE n.rolname ~ '^pawl_net_[a-z][a-z0-9_]*$' AND NOT EXISTS (
        SELECT FROM pg_auth_members m JOIN pg_roles g ON g.oid = m.member
        WHERE m.roleid = n.oid AND g.rolname LIKE 'pawl-shape-%') LOOP
        PERFORM pawl.drop_role(r.rolname);
    END LOOP;
    RETURN shapes;
END $$;

-- Removes logins that expired ten minutes ago and that Vault failed to end, and logins that ended but could not be
-- dropped then. It also removes shapes that were unused for the given time and have no member, and records of logins
-- that ended a week ago. If more is true, another call can remove more. A call that disables a login does not drop it:
-- an error in the same transaction would undo that.
CREATE OR REPLACE FUNCTION pawl.collect(
    unused interval, OUT logins int, OUT shapes int, OUT records int, OUT more boolean)
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET client_min_messages = error SET lock_timeout = '2s' AS $$
DECLARE
    alive   text[];
    dead    text[];
    done    int;
    objects int;
BEGIN
    PERFORM pawl.commit_locally();
    IF (unused >= interval '1 hour') IS NOT TRUE THEN
        RAISE 'unused must be at least an hour: brokers cache the shapes that they made' USING ERRCODE = '22023';
    END IF;
    -- In random order, so that no number of logins that cannot be dropped stands before all others.
    SELECT array_agg(e.name) FILTER (WHERE e.rolcanlogin), array_agg(e.name) FILTER (WHERE NOT e.rolcanlogin)
    INTO alive, dead FROM (
        SELECT o.name::text, o.rolcanlogin FROM pawl.logins l JOIN pawl.roles o USING (grant_id)
        WHERE NOT o.rolcanlogin OR o.rolvaliduntil < now() - interval '10 minutes' ORDER BY random() LIMIT 1000
        FOR UPDATE OF l SKIP LOCKED) e;
    PERFORM pawl.hang_up_once(ARRAY(SELECT p.role FROM pawl.roles p WHERE p.name = ANY (alive || dead)));
    done := (SELECT d.done FROM pawl.disable(alive) d);
    UPDATE pawl.logins l SET ended = now() FROM unnest(dead) n WHERE l.grant_id = substr(n, 6, 26) AND l.ended IS NULL;
    SELECT d.dropped, d.objects INTO logins, objects FROM pawl.drop_logins(dead) d;
    more := done + logins + objects > 0;
    shapes := pawl.collect_shapes(unused, '2 seconds');
    DELETE FROM pawl.logins l WHERE l.ended < now() - interval '7 days'
        AND NOT EXISTS (SELECT FROM pg_prepared_xact() x WHERE x.ownerid = l.role)
        AND NOT EXISTS (SELECT FROM pg_stat_activity a WHERE a.usesysid = l.role)
        AND NOT EXISTS (SELECT FROM pg_roles p WHERE p.oid = l.role);
    GET DIAGNOSTICS records = ROW_COUNT;
END $$;

-- ---------------------------------------------------------------- shapes of version 1

-- In version 1 the group of a shape held the rights itself. If its tables are gone it stays until pawl.collect drops
-- it.
DO $$
DECLARE
    r record;
BEGIN
    FOR r IN SELECT s.shape, s.spec::jsonb AS spec, 'pawl-shape-' || s.shape AS grp FROM pawl.shapes s
        JOIN pg_roles p ON p.rolname = 'pawl-shape-' || s.shape
        WHERE current_setting('pawl.version_before') < '2' AND NOT s.spec::jsonb ? 'filter' LOOP
        BEGIN
            EXECUTE format('GRANT %I TO pawl_maker', r.grp); -- DROP OWNED needs the rights of the role
            EXECUTE format('DROP OWNED BY %I', r.grp);
            EXECUTE format('REVOKE %I FROM pawl_maker', r.grp);
            PERFORM pawl.build_shape(r.shape, r.spec);
        EXCEPTION WHEN undefined_table OR invalid_schema_name OR insufficient_privilege THEN
        END;
    END LOOP;
END $$;

-- ---------------------------------------------------------------- privileges

REVOKE ALL ON SCHEMA pawl FROM PUBLIC;
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA pawl FROM PUBLIC, pawl_vault, pawl_shaper, pawl_revoker;
REVOKE ALL ON ALL TABLES IN SCHEMA pawl FROM PUBLIC, pawl_vault, pawl_shaper, pawl_revoker;
GRANT USAGE ON SCHEMA pawl TO pawl_vault, pawl_shaper, pawl_revoker;
GRANT EXECUTE ON FUNCTION pawl.version(), pawl.limits() TO pawl_vault, pawl_shaper, pawl_revoker;
GRANT EXECUTE ON FUNCTION pawl.grant_login(text, text, timestamptz), pawl.end_logins(text[]),
    pawl.grant_service_login(text, text, timestamptz, text), pawl.end_service_login(text) TO pawl_vault;
GRANT EXECUTE ON FUNCTION pawl.ensure_shape(text, text, text) TO pawl_shaper;
GRANT EXECUTE ON FUNCTION pawl.sever(text[]), pawl.bar(text[]), pawl.inspect(text[]), pawl.remove(text[]),
    pawl.recorded(text[]), pawl.prepared(text[]), pawl.lend(text[]), pawl.give_back(), pawl.collect(interval),
    pawl.cut(text[]), pawl.known(text[]), pawl.position(), pawl.check_primary() TO pawl_revoker;

-- The role that runs this script can list and drop shapes and adopt logins, and let others do so.
DO $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA pawl TO %I WITH GRANT OPTION', current_setting('pawl.setup_role'));
    EXECUTE format('GRANT EXECUTE ON FUNCTION pawl.sequence_grants(), pawl.limits(), pawl.list_shapes(), '
        'pawl.drop_views(regclass), pawl.adopt_logins() TO %I WITH GRANT OPTION', current_setting('pawl.setup_role'));
END $$;

RESET ROLE;
-- no superuser: SELECT pawl.limits() AS "not promised in this database";
-- no superuser: REVOKE pawl_maker FROM CURRENT_USER;
