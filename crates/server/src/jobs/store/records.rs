//! What is kept of a job.

use rusqlite::{Connection, Row};

use super::Result;
use crate::jobs::job::{JobRequest, Status};

/// A picture as it was sent, with what is shown of it.
#[derive(Debug, Clone)]
pub struct Input {
    pub bytes: Vec<u8>,
    /// A small JPEG.
    pub thumbnail: Vec<u8>,
    pub width: u32,
    pub height: u32,
    /// The file's name, where one was given.
    pub name: Option<String>,
}

/// A job to be kept.
pub struct Accepted {
    pub id: String,
    /// Whose it is: stands for an API key, or is empty where there are none.
    pub owner: String,
    pub request: JobRequest,
    pub model: String,
    pub input: Option<Input>,
    /// The caller's name for this request, and a hash of the request: a second one of that name is the same job.
    pub idempotency: Option<(String, String)>,
    pub webhook: Option<Webhook>,
}

/// Whom to tell when a job has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Webhook {
    pub url: String,
    pub secret: Option<String>,
}

/// What became of a job to be kept.
#[derive(Debug, PartialEq, Eq)]
pub enum Acceptance {
    New,
    /// The job of that id was accepted earlier for the same request.
    Known(String),
    /// Another request had the same idempotency key.
    Conflict,
}

/// A job as it is kept.
#[derive(Debug, Clone)]
pub struct Record {
    pub id: String,
    pub owner: String,
    pub status: Status,
    pub request: JobRequest,
    pub model: String,
    /// Milliseconds since 1970.
    pub created_at: i64,
    pub started_at: Option<i64>,
    pub finished_at: Option<i64>,
    pub error: Option<String>,
    pub input: Option<InputRecord>,
    /// Width and height of the images that are done, in the order of the seeds.
    pub images: Vec<(u32, u32)>,
}

#[derive(Debug, Clone)]
pub struct InputRecord {
    pub width: u32,
    pub height: u32,
    pub name: Option<String>,
}

/// What [`record`] reads.
pub const COLUMNS: &str = "id, owner, status, request, model, created_at, started_at, finished_at, error, input_width, \
                       input_height, input_name";

pub fn record(row: &Row<'_>) -> rusqlite::Result<Record> {
    let text = |name: &'static str| row.get::<_, String>(name);
    let request = serde_json::from_str(&text("request")?)
        .map_err(|e| rusqlite::Error::FromSqlConversionFailure(3, rusqlite::types::Type::Text, Box::new(e)))?;
    let input = match (row.get("input_width")?, row.get("input_height")?) {
        (Some(width), Some(height)) => Some(InputRecord { width, height, name: row.get("input_name")? }),
        _ => None,
    };
    Ok(Record {
        id: text("id")?,
        owner: text("owner")?,
        status: Status::parse(&text("status")?).unwrap_or(Status::Failed),
        request,
        model: text("model")?,
        created_at: row.get("created_at")?,
        started_at: row.get("started_at")?,
        finished_at: row.get("finished_at")?,
        error: row.get("error")?,
        input,
        images: Vec::new(),
    })
}

pub fn with_images(connection: &Connection, mut record: Record) -> Result<Record> {
    let mut statement =
        connection.prepare_cached("SELECT width, height FROM images WHERE job = ?1 ORDER BY position")?;
    let sizes = statement.query_map([&record.id], |row| Ok((row.get(0)?, row.get(1)?)))?;
    record.images = sizes.collect::<rusqlite::Result<_>>()?;
    Ok(record)
}
