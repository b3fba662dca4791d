-- The layout of a SQLite store, as numbered migrations. `PRAGMA user_version` says up to which one a database is; each
-- is applied in one transaction and never changed once it is released. Times are nanoseconds since 1970.

-- migration 1

-- One row: who writes, and how far the history goes.
CREATE TABLE meta (
    id            INTEGER PRIMARY KEY CHECK (id = 0),
    epoch         INTEGER NOT NULL,  -- of the process that writes; checked in every commit
    last_cycle_id INTEGER NOT NULL,
    last_revision INTEGER NOT NULL,
    pruned_to     INTEGER NOT NULL,  -- the highest revision that was ever removed
    boot_id       TEXT,              -- of the machine's start in which the last process opened this
    is_closed     INTEGER NOT NULL   -- the last process wrote everything that it had to
);
INSERT INTO meta VALUES (0, 0, 0, 0, 0, NULL, 1);

-- The history. `record` is the encoded CycleTelemetry, byte for byte as it was first written; the other columns only
-- find it.
CREATE TABLE cycles (
    cycle_id    INTEGER PRIMARY KEY,
    revision    INTEGER NOT NULL UNIQUE,
    epoch       INTEGER NOT NULL,
    state       INTEGER NOT NULL,    -- 1 succeeded, 2 degraded, 3 failed, 4 cancelled, 5 interrupted
    trigger     INTEGER NOT NULL,    -- 0 unknown, 1 manual, 2 loop
    loop        TEXT,
    request_id  TEXT,
    finished_at INTEGER NOT NULL,
    record      BLOB NOT NULL
);
CREATE INDEX cycles_by_state ON cycles (state);
CREATE INDEX cycles_by_request ON cycles (request_id) WHERE request_id IS NOT NULL;

-- How many records there are of each state, so that retention need not count them.
CREATE TABLE counts (
    state  INTEGER PRIMARY KEY,
    cycles INTEGER NOT NULL
);
INSERT INTO counts VALUES (1, 0), (2, 0), (3, 0), (4, 0), (5, 0);

-- Cycles that were admitted and are not recorded yet.
CREATE TABLE open_cycles (
    cycle_id     INTEGER PRIMARY KEY,
    trigger      INTEGER NOT NULL,
    loop         TEXT,
    scheduled_at INTEGER NOT NULL,
    started_at   INTEGER,
    request_id   TEXT
);

-- The latest output of each subsystem, as an encoded google.protobuf.Struct.
CREATE TABLE outputs (
    name     TEXT PRIMARY KEY,
    cycle_id INTEGER NOT NULL,
    payload  BLOB NOT NULL
);

-- What is known of subsystems beyond the configuration file. `spec` is JSON; NULL when the file has the registration.
CREATE TABLE subsystems (
    name      TEXT PRIMARY KEY,
    spec      TEXT,
    lease_ms  INTEGER,
    suspended INTEGER NOT NULL
);

-- The same for loops. `state` is JSON.
CREATE TABLE loops (
    name  TEXT PRIMARY KEY,
    spec  TEXT,
    state TEXT NOT NULL
);

-- migration 2

-- The trace that a cycle belongs to, as 16 bytes.
ALTER TABLE open_cycles ADD COLUMN trace_id BLOB;

-- migration 3

-- Which database this is, and which file it was when it was last written by a process that had opened it: a copy is
-- another file, and is told by that. `path` is absolute and without links; NULL before that was noted.
ALTER TABLE meta ADD COLUMN database_id BLOB;  -- 16 random bytes, which a copy shares
ALTER TABLE meta ADD COLUMN path    BLOB;
ALTER TABLE meta ADD COLUMN device  INTEGER;
ALTER TABLE meta ADD COLUMN inode   INTEGER;
ALTER TABLE meta ADD COLUMN commits INTEGER NOT NULL DEFAULT 0;  -- made so far
UPDATE meta SET database_id = randomblob(16);

-- migration 4

-- The history goes by revision: records come in any order of their cycles.
DROP INDEX cycles_by_state;
CREATE INDEX cycles_by_state ON cycles (state, revision);
DROP INDEX cycles_by_request;
CREATE INDEX cycles_by_request ON cycles (request_id, revision) WHERE request_id IS NOT NULL;

-- What is needed to run a cycle that waits after a restart. NULL once it has begun, and where it is not to be run then.
ALTER TABLE open_cycles ADD COLUMN request BLOB;

-- `meta.last_cycle_id` is the highest id that was given to any cycle, and each id up to it is open, recorded or pruned.
-- Until now it was that of the last record, and only some of the cycles above it are open. The others get a row of
-- which nothing is known: trigger 0. A row far above all others is damage, and counts for nothing.
DELETE FROM open_cycles WHERE cycle_id <= (SELECT last_cycle_id FROM meta);
WITH RECURSIVE
    above (first, last) AS (
        SELECT last_cycle_id + 1, (SELECT max(cycle_id) FROM open_cycles WHERE cycle_id <= last_cycle_id + 10000) FROM meta
    ),
    given (cycle_id) AS (
        SELECT first FROM above WHERE first <= last
        UNION ALL SELECT cycle_id + 1 FROM given, above WHERE cycle_id < last
    )
INSERT OR IGNORE INTO open_cycles (cycle_id, trigger, scheduled_at) SELECT cycle_id, 0, 0 FROM given;
UPDATE meta SET last_cycle_id =
    coalesce((SELECT max(cycle_id) FROM open_cycles WHERE cycle_id <= last_cycle_id + 10000), last_cycle_id);

-- migration 5

-- The log of the history: a Merkle tree over the records, and over entries about itself. A record has a leaf unless it
-- is older than the log. What is known of leaves below `log_first_kept` are the hashes that proofs of later ones need.
ALTER TABLE cycles ADD COLUMN leaf INTEGER;
ALTER TABLE meta ADD COLUMN log_size       INTEGER NOT NULL DEFAULT 0;  -- leaves so far
ALTER TABLE meta ADD COLUMN log_first_kept INTEGER NOT NULL DEFAULT 0;

-- The complete nodes of the tree, numbered in the order in which they become complete.
CREATE TABLE hashes (
    id   INTEGER PRIMARY KEY,
    hash BLOB NOT NULL
);

-- The entries of the log that are not records, such as which ones were removed. `entry` is an encoded ControlEntry.
CREATE TABLE control (
    leaf  INTEGER PRIMARY KEY,
    entry BLOB NOT NULL
);

-- migration 6

-- The caller that registered a subsystem; NULL if nobody owns it.
ALTER TABLE subsystems ADD COLUMN owner TEXT;

-- migration 7

-- The caller that started a cycle; NULL if a loop did, or callers were not told apart. A `request_id` belongs to it.
ALTER TABLE cycles ADD COLUMN triggered_by TEXT;
ALTER TABLE open_cycles ADD COLUMN triggered_by TEXT;

-- migration 8

-- The audit events in the log. `event` is an encoded AuditEvent; the other columns only find it.
CREATE TABLE audit (
    leaf   INTEGER PRIMARY KEY,
    time   INTEGER NOT NULL,
    caller TEXT NOT NULL,
    rpc    TEXT NOT NULL,
    denied INTEGER NOT NULL,
    event  BLOB NOT NULL
);

-- The part of its audit event that is known before a cycle is recorded, as an encoded AuditEvent. NULL if it is written
-- already, or if a loop started the cycle.
ALTER TABLE open_cycles ADD COLUMN audit BLOB;

-- migration 9

-- Whether all entries of a part of the log are removed, and its hashes with them.
CREATE INDEX cycles_by_leaf ON cycles (leaf);

-- Number of audit events, so that retention need not count them.
ALTER TABLE meta ADD COLUMN audit_events INTEGER NOT NULL DEFAULT 0;
UPDATE meta SET audit_events = (SELECT count(*) FROM audit);

-- migration 10

-- Seals: keyed digests, which programs without the key of the log can't make. `meta.seal` is that of the end of the log;
-- the others are those of their rows. NULL before an earlier version's database is first written.
ALTER TABLE meta        ADD COLUMN seal BLOB;
ALTER TABLE subsystems  ADD COLUMN seal BLOB;
ALTER TABLE loops       ADD COLUMN seal BLOB;
ALTER TABLE outputs     ADD COLUMN seal BLOB;
ALTER TABLE open_cycles ADD COLUMN seal BLOB;

-- migration 11

-- What an audit event is about: 1 a change, 2 calls that changed nothing, 3 denied calls. Retention keeps as many of
-- each kind, and need not count them.
ALTER TABLE audit ADD COLUMN kind INTEGER NOT NULL DEFAULT 1;
CREATE INDEX audit_by_kind ON audit (kind, leaf);
CREATE TABLE audit_counts (
    kind   INTEGER PRIMARY KEY,
    events INTEGER NOT NULL
);
INSERT INTO audit_counts SELECT 1, audit_events FROM meta;
INSERT INTO audit_counts VALUES (2, 0), (3, 0);
ALTER TABLE meta DROP COLUMN audit_events;

-- migration 12

-- The highest revision of the records that are older than the log: all others have a leaf.
ALTER TABLE meta ADD COLUMN unlogged_to INTEGER NOT NULL DEFAULT 0;
UPDATE meta SET unlogged_to =
    coalesce((SELECT max(revision) FROM cycles WHERE leaf IS NULL AND typeof(revision) = 'integer'), 0);

-- migration 13

-- Numbers of the records of each state, and of the audit events of each kind, so that retention need not count them. In
-- this row they are sealed.
ALTER TABLE meta ADD COLUMN succeeded   INTEGER NOT NULL DEFAULT 0;
ALTER TABLE meta ADD COLUMN degraded    INTEGER NOT NULL DEFAULT 0;
ALTER TABLE meta ADD COLUMN failed      INTEGER NOT NULL DEFAULT 0;
ALTER TABLE meta ADD COLUMN cancelled   INTEGER NOT NULL DEFAULT 0;
ALTER TABLE meta ADD COLUMN interrupted INTEGER NOT NULL DEFAULT 0;
ALTER TABLE meta ADD COLUMN changes     INTEGER NOT NULL DEFAULT 0;
ALTER TABLE meta ADD COLUMN calls       INTEGER NOT NULL DEFAULT 0;
ALTER TABLE meta ADD COLUMN denials     INTEGER NOT NULL DEFAULT 0;
UPDATE meta SET
    succeeded   = (SELECT count(*) FROM cycles WHERE state = 1),
    degraded    = (SELECT count(*) FROM cycles WHERE state = 2),
    failed      = (SELECT count(*) FROM cycles WHERE state = 3),
    cancelled   = (SELECT count(*) FROM cycles WHERE state = 4),
    interrupted = (SELECT count(*) FROM cycles WHERE state = 5),
    changes     = (SELECT count(*) FROM audit WHERE kind = 1),
    calls       = (SELECT count(*) FROM audit WHERE kind = 2),
    denials     = (SELECT count(*) FROM audit WHERE kind = 3);
DROP TABLE counts;
DROP TABLE audit_counts;

-- migration 14

-- The history in the order of its revisions: what reads and retention follow is the table itself, and no index. A
-- revision that can't be read gives the record no place in it, and becomes a negative one.
CREATE TABLE history (
    revision     INTEGER PRIMARY KEY,
    cycle_id     INTEGER NOT NULL UNIQUE,
    epoch        INTEGER NOT NULL,
    state        INTEGER NOT NULL,
    trigger      INTEGER NOT NULL,
    loop         TEXT,
    request_id   TEXT,
    triggered_by TEXT,
    finished_at  INTEGER NOT NULL,
    leaf         INTEGER,
    record       BLOB NOT NULL
);
-- By the table itself: its index may be damaged, and then one revision may be there twice.
INSERT OR IGNORE INTO history
    SELECT iif(typeof(revision) = 'integer' AND revision > 0, revision, min(cycle_id, -cycle_id)), cycle_id, coalesce(epoch, 0),
           coalesce(state, 0), coalesce(trigger, 0), loop, request_id, triggered_by, coalesce(finished_at, 0), leaf,
           coalesce(record, x'')
    FROM cycles NOT INDEXED ORDER BY cycle_id;
INSERT OR IGNORE INTO history
    SELECT min(cycle_id, -cycle_id), cycle_id, coalesce(epoch, 0), coalesce(state, 0), coalesce(trigger, 0), loop, request_id,
           triggered_by, coalesce(finished_at, 0), leaf, coalesce(record, x'')
    FROM cycles NOT INDEXED WHERE cycle_id NOT IN (SELECT cycle_id FROM history);
DROP TABLE cycles;
PRAGMA legacy_alter_table = ON;  -- views of other programs stay as they are
ALTER TABLE history RENAME TO cycles;
PRAGMA legacy_alter_table = OFF;
CREATE INDEX cycles_by_request ON cycles (request_id, triggered_by) WHERE request_id IS NOT NULL;

-- Retention goes through the audit in the order of its leaves.
DROP INDEX audit_by_kind;

-- migration 15

-- What the control entries of the log say, so that one that is missing, or has come back, is noticed: the number of
-- leaves that retention has removed, and the leaf of the entry with which the entries were counted anew, or -1.
ALTER TABLE meta ADD COLUMN log_removed    INTEGER NOT NULL DEFAULT 0;
ALTER TABLE meta ADD COLUMN log_counted_at INTEGER NOT NULL DEFAULT -1;

-- migration 16

-- The former names of a subsystem, newest first, as a JSON array; NULL if it has none.
ALTER TABLE subsystems ADD COLUMN former_names TEXT;
