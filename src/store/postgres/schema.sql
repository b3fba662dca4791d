-- The layout of a store in PostgreSQL, as numbered migrations. `store_schema` says up to which one a database is; each
-- is applied in one transaction and never changed once it is released. SCHEMA stands for the schema of the tables.
-- Times are nanoseconds since 1970.
--
-- A migration only adds: software of the version before it goes on with it while replicas are replaced, one by one.

-- migration 1, usable from 1

-- One row: who writes, and how far the history goes. Each commit writes it, so its page has room for the next version.
CREATE TABLE SCHEMA.meta (
    id             smallint PRIMARY KEY CHECK (id = 0),
    store_id       bytea    NOT NULL,             -- 16 random bytes, which a copy shares
    epoch          bigint   NOT NULL DEFAULT 0,   -- of the process that writes; checked in every commit
    token          bigint   NOT NULL DEFAULT 0,   -- of the last commit or barrier
    found          bigint   NOT NULL DEFAULT 0,   -- the token that the first barrier after a commit has found
    commits        bigint   NOT NULL DEFAULT 0,   -- made so far
    last_cycle_id  bigint   NOT NULL DEFAULT 0,   -- the highest id that was given to any cycle
    last_revision  bigint   NOT NULL DEFAULT 0,
    pruned_to      bigint   NOT NULL DEFAULT 0,   -- the highest revision that was ever removed
    log_size       bigint   NOT NULL DEFAULT 0,   -- leaves so far
    log_first_kept bigint   NOT NULL DEFAULT 0,   -- all entries below this leaf are removed
    log_removed    bigint   NOT NULL DEFAULT 0,   -- leaves that retention has removed
    log_counted_at bigint   NOT NULL DEFAULT -1,  -- the leaf of the entry with which the entries were counted anew
    unlogged_to    bigint   NOT NULL DEFAULT 0,   -- the highest revision of the records that are older than the log
    is_closed      boolean  NOT NULL DEFAULT true, -- the last process wrote everything that it had to
    not_served     text,                          -- NULL if it may be served; the URL of the store that it was copied
                                                  -- to; or, for an unfinished copy, unfinished: and the URL of that
    -- Numbers of the records of each state, and of the audit events of each kind, so that retention need not count them.
    succeeded      bigint   NOT NULL DEFAULT 0,
    degraded       bigint   NOT NULL DEFAULT 0,
    failed         bigint   NOT NULL DEFAULT 0,
    cancelled      bigint   NOT NULL DEFAULT 0,
    interrupted    bigint   NOT NULL DEFAULT 0,
    changes        bigint   NOT NULL DEFAULT 0,
    calls          bigint   NOT NULL DEFAULT 0,
    denials        bigint   NOT NULL DEFAULT 0,
    seal           bytea                          -- of the end of the log, and of this row
) WITH (fillfactor = 10);
INSERT INTO SCHEMA.meta (id, store_id) VALUES (0, decode(replace(gen_random_uuid()::text, '-', ''), 'hex'));

-- One row: which replica leads. The leader raises `beat` at short intervals. Not in `meta`, which is locked while a
-- commit waits for a standby.
CREATE TABLE SCHEMA.leader (
    id       smallint PRIMARY KEY CHECK (id = 0),
    epoch    bigint   NOT NULL DEFAULT 0,         -- of the last claim
    claim    bigint   NOT NULL DEFAULT 0,         -- the id of the last claim, which is random
    beat     bigint   NOT NULL DEFAULT 0,         -- renewals of all terms, and claims
    released boolean  NOT NULL DEFAULT true,      -- the term has ended
    replica  text     NOT NULL DEFAULT '',        -- its name
    address  text,                                -- where other replicas reach it
    lease_ms bigint   NOT NULL DEFAULT 0,         -- the TTL of its lease
    orchestrator_id text                          -- whose replicas have claimed it; NULL if none ever has
) WITH (fillfactor = 10);
INSERT INTO SCHEMA.leader (id) VALUES (0);

-- The history. `record` is the encoded CycleTelemetry, byte for byte as it was first written; the other columns only
-- find it. It does not compress, so no time is spent on that.
CREATE TABLE SCHEMA.cycles (
    revision     bigint   PRIMARY KEY,
    cycle_id     bigint   NOT NULL UNIQUE,
    epoch        bigint   NOT NULL,
    state        smallint NOT NULL,               -- 1 succeeded, 2 degraded, 3 failed, 4 cancelled, 5 interrupted
    trigger      smallint NOT NULL,               -- 0 unknown, 1 manual, 2 loop, 3 parent
    loop         text COLLATE "C",
    request_id   bytea,                           -- UTF-8, which may have characters that text has not
    triggered_by text COLLATE "C",                -- the caller that started it; NULL if a loop did
    finished_at  bigint   NOT NULL,
    leaf         bigint,                          -- in the log; NULL for a record that is older than it
    record       bytea    NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0.02);
ALTER TABLE SCHEMA.cycles ALTER COLUMN record SET STORAGE EXTERNAL;
CREATE INDEX cycles_by_request ON SCHEMA.cycles (request_id, triggered_by) WHERE request_id IS NOT NULL;

-- Cycles that were admitted and are not recorded yet.
CREATE TABLE SCHEMA.open_cycles (
    cycle_id     bigint   PRIMARY KEY,
    trigger      smallint NOT NULL,
    loop         text COLLATE "C",
    scheduled_at bigint   NOT NULL,
    started_at   bigint,
    request_id   bytea,
    triggered_by text COLLATE "C",
    trace_id     bytea,                           -- 16 bytes
    request      bytea,                           -- to run it after a restart; NULL if it has begun, or is not to be run
    audit        bytea,                           -- the part of its audit event that is known before it is recorded
    seal         bytea
) WITH (autovacuum_vacuum_scale_factor = 0.02);

-- The latest output of each subsystem, as an encoded google.protobuf.Struct. Each cycle replaces most of them.
CREATE TABLE SCHEMA.outputs (
    name     text COLLATE "C" PRIMARY KEY,
    cycle_id bigint NOT NULL,
    payload  bytea  NOT NULL,
    seal     bytea
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.02);

-- What is known of subsystems beyond the configuration file. `spec` is JSON, as text, whose bytes are sealed; NULL when
-- the file has the registration.
CREATE TABLE SCHEMA.subsystems (
    name         text COLLATE "C" PRIMARY KEY,
    spec         text,
    lease_ms     bigint,
    suspended    boolean NOT NULL,
    owner        text,
    former_names text,                            -- a JSON array, newest first; NULL if it has none
    seal         bytea
);

-- The same for loops. `state` is JSON.
CREATE TABLE SCHEMA.loops (
    name  text COLLATE "C" PRIMARY KEY,
    spec  text,
    state text NOT NULL,
    seal  bytea
);

-- The complete nodes of the log, which is a Merkle tree, numbered in the order in which they become complete.
CREATE TABLE SCHEMA.hashes (
    id   bigint PRIMARY KEY,
    hash bytea  NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0.02);

-- The entries of the log that are about the log itself, such as which ones were removed: an encoded ControlEntry each.
CREATE TABLE SCHEMA.control (
    leaf  bigint PRIMARY KEY,
    entry bytea  NOT NULL
);

-- The audit events in the log. `event` is an encoded AuditEvent; the other columns only find it.
CREATE TABLE SCHEMA.audit (
    leaf   bigint   PRIMARY KEY,
    kind   smallint NOT NULL,                     -- 1 a change, 2 calls that changed nothing, 3 denied calls
    time   bigint   NOT NULL,
    caller text     NOT NULL,
    rpc    text     NOT NULL,
    denied boolean  NOT NULL,
    event  bytea    NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0.02);

-- The newest checkpoint of the log: one row, once there is one.
CREATE TABLE SCHEMA.checkpoint (
    id   smallint PRIMARY KEY CHECK (id = 0),
    note text     NOT NULL
) WITH (fillfactor = 10);
