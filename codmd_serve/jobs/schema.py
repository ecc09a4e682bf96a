"""Tables of the job store and the numbered migrations that make them. Knows no job logic.

A migration is never edited once released: a change of the schema is a new one at the end of MIGRATIONS.
"""

from sqlalchemy import BigInteger, Boolean, Column, Connection, Double, Integer, MetaData, String, Table, Text, text

metadata = MetaData()
NUMBER = BigInteger().with_variant(Integer, "sqlite")

schema_table = Table("codmd_schema", metadata, Column("version", Integer, primary_key=True))
jobs_table = Table(
    "codmd_jobs",
    metadata,
    Column("number", NUMBER, primary_key=True),
    Column("id", String(40), nullable=False, unique=True),
    Column("owner", String(64), nullable=False),
    Column("status", String(12), nullable=False),
    Column("bundle", String(64), nullable=False),
    Column("model", Text, nullable=False),
    Column("content_key", String(64), nullable=False),
    Column("params", Text, nullable=False),
    Column("is_preview", Boolean, nullable=False),
    Column("is_detached", Boolean, nullable=False),
    Column("idempotency_key", Text),
    Column("body_hash", String(64), nullable=False),
    Column("created_at", Double, nullable=False),
    Column("started_at", Double),
    Column("finished_at", Double),
    Column("attempts", Integer, nullable=False),
    Column("is_alone", Boolean, nullable=False),
    Column("is_cancel_requested", Boolean, nullable=False),
    Column("is_reused", Boolean, nullable=False),
    Column("is_deleted", Boolean, nullable=False),
    Column("lease_owner", String(40), nullable=False),
    Column("lease_until", Double, nullable=False),
    Column("timings_ms", Text, nullable=False),
    Column("warnings", Text, nullable=False),
    Column("peak_memory_mb", Double),
    Column("error_code", Text, nullable=False),
    Column("error_message", Text, nullable=False),
    Column("result_id", String(40)),
    Column("webhook_url", Text, nullable=False),
)
results_table = Table(
    "codmd_results",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("content_key", String(64), nullable=False),
    Column("name", Text, nullable=False),
    Column("num_bytes", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("media_type", Text, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("used_at", Double, nullable=False),
    Column("expires_at", Double, nullable=False),
)
dispatchers_table = Table(
    "codmd_dispatchers",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("bundle", String(64), nullable=False),
    Column("model", Text, nullable=False),
    Column("engine_key", String(64), nullable=False),
    Column("facts", Text, nullable=False),
    Column("capacity", Integer, nullable=False),
    Column("is_ready", Boolean, nullable=False),
    Column("reason", Text, nullable=False),
    Column("service_s", Double, nullable=False),
    Column("alive_until", Double, nullable=False),
)
webhooks_table = Table(
    "codmd_webhooks",
    metadata,
    Column("job_id", String(40), primary_key=True),
    Column("attempts", Integer, nullable=False),
    Column("due_at", Double, nullable=False),
)

# {number} is a key that counts up and is never used twice, {double} a 64-bit float.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE codmd_jobs (number {number}, id VARCHAR(40) NOT NULL UNIQUE, owner VARCHAR(64) NOT NULL,
        status VARCHAR(12) NOT NULL, bundle VARCHAR(64) NOT NULL, model TEXT NOT NULL, content_key VARCHAR(64) NOT NULL,
        params TEXT NOT NULL, is_preview BOOLEAN NOT NULL, is_detached BOOLEAN NOT NULL, idempotency_key TEXT,
        body_hash VARCHAR(64) NOT NULL, created_at {double} NOT NULL, started_at {double}, finished_at {double},
        attempts INTEGER NOT NULL, is_alone BOOLEAN NOT NULL, is_cancel_requested BOOLEAN NOT NULL,
        is_reused BOOLEAN NOT NULL, is_deleted BOOLEAN NOT NULL, lease_owner VARCHAR(40) NOT NULL,
        lease_until {double} NOT NULL, timings_ms TEXT NOT NULL, warnings TEXT NOT NULL, peak_memory_mb {double},
        error_code TEXT NOT NULL, error_message TEXT NOT NULL, result_id VARCHAR(40))""",
        "CREATE INDEX codmd_jobs_queue ON codmd_jobs (status, bundle, number)",
        "CREATE INDEX codmd_jobs_owner ON codmd_jobs (owner, number)",
        "CREATE INDEX codmd_jobs_result ON codmd_jobs (result_id)",
        "CREATE UNIQUE INDEX codmd_jobs_idempotency ON codmd_jobs (owner, idempotency_key)",
        """CREATE TABLE codmd_results (id VARCHAR(40) PRIMARY KEY, content_key VARCHAR(64) NOT NULL, name TEXT NOT NULL,
        num_bytes BIGINT NOT NULL, sha256 VARCHAR(64) NOT NULL, media_type TEXT NOT NULL, created_at {double} NOT NULL,
        used_at {double} NOT NULL, expires_at {double} NOT NULL)""",
        "CREATE INDEX codmd_results_content ON codmd_results (content_key)",
        """CREATE TABLE codmd_dispatchers (id VARCHAR(40) PRIMARY KEY, bundle VARCHAR(64) NOT NULL, model TEXT NOT NULL,
        engine_key VARCHAR(64) NOT NULL, facts TEXT NOT NULL, capacity INTEGER NOT NULL, is_ready BOOLEAN NOT NULL,
        reason TEXT NOT NULL, service_s {double} NOT NULL, alive_until {double} NOT NULL)""",
    ),
    (
        "ALTER TABLE codmd_jobs ADD COLUMN webhook_url TEXT NOT NULL DEFAULT ''",
        """CREATE TABLE codmd_webhooks (job_id VARCHAR(40) PRIMARY KEY, attempts INTEGER NOT NULL,
        due_at {double} NOT NULL)""",
    ),
)
VERSION = len(MIGRATIONS)
TYPES = {
    "sqlite": {"number": "INTEGER PRIMARY KEY AUTOINCREMENT", "double": "REAL"},
    "postgresql": {"number": "BIGINT GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY", "double": "DOUBLE PRECISION"},
}


def migrate(connection: Connection, found: int, wanted: int = VERSION) -> None:
    """Bring the schema from version `found` (0: nothing there) to `wanted`, inside the caller's transaction."""
    types = TYPES[connection.dialect.name]
    if found == 0:
        connection.execute(text("CREATE TABLE codmd_schema (version INTEGER PRIMARY KEY)"))
        connection.execute(schema_table.insert().values(version=0))
    for statements in MIGRATIONS[found:wanted]:
        for statement in statements:
            connection.execute(text(statement.format(**types)))
    connection.execute(schema_table.update().values(version=wanted))
