//! Webhooks that are to be called.

use rusqlite::params;

use super::{Result, Store, Webhook};

/// A webhook that is due.
#[derive(Debug, Clone)]
pub struct DueWebhook {
    pub job: String,
    pub webhook: Webhook,
    pub attempts: u32,
}

impl Store {
    /// The webhooks to be called by now.
    pub fn due_webhooks(&self, now: i64) -> Result<Vec<DueWebhook>> {
        let connection = self.read();
        let mut statement = connection.prepare_cached(
            "SELECT job, url, secret, attempts FROM webhooks WHERE due_at <= ?1 ORDER BY due_at LIMIT 256",
        )?;
        let due = statement.query_map([now], |row| {
            Ok(DueWebhook {
                job: row.get(0)?,
                webhook: Webhook { url: row.get(1)?, secret: row.get(2)? },
                attempts: row.get(3)?,
            })
        })?;
        Ok(due.collect::<rusqlite::Result<_>>()?)
    }

    /// Settles a webhook (`None`), or puts it off.
    pub fn put_off_webhook(&self, job: &str, due_at: Option<i64>) -> Result<()> {
        let query = "UPDATE webhooks SET attempts = attempts + 1, due_at = ?2 WHERE job = ?1";
        self.write().execute(query, params![job, due_at])?;
        Ok(())
    }
}
