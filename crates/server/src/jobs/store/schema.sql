CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    status TEXT NOT NULL,
    request TEXT NOT NULL,
    model TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    started_at INTEGER,
    finished_at INTEGER,
    attempts INTEGER NOT NULL DEFAULT 0,
    error TEXT,
    idempotency_key TEXT,
    request_hash TEXT,
    input_width INTEGER,
    input_height INTEGER,
    input_name TEXT
);
CREATE UNIQUE INDEX jobs_by_idempotency_key ON jobs (owner, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX jobs_unfinished ON jobs (number) WHERE status IN ('queued', 'running');
CREATE INDEX jobs_by_owner ON jobs (owner, number);
CREATE INDEX jobs_by_end ON jobs (finished_at) WHERE finished_at IS NOT NULL;
CREATE TABLE inputs (
    job TEXT PRIMARY KEY REFERENCES jobs (id) ON DELETE CASCADE,
    bytes BLOB NOT NULL,
    thumbnail BLOB NOT NULL
);
CREATE TABLE images (
    job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    position INTEGER NOT NULL,
    width INTEGER NOT NULL,
    height INTEGER NOT NULL,
    PRIMARY KEY (job, position)
) WITHOUT ROWID;
CREATE TABLE webhooks (
    job TEXT PRIMARY KEY REFERENCES jobs (id) ON DELETE CASCADE,
    url TEXT NOT NULL,
    secret TEXT,
    attempts INTEGER NOT NULL DEFAULT 0,
    due_at INTEGER
);
CREATE INDEX webhooks_due ON webhooks (due_at) WHERE due_at IS NOT NULL;
CREATE TABLE secrets (name TEXT PRIMARY KEY, value BLOB NOT NULL);
PRAGMA user_version = 1;
