//! How a request is refused.

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use utoipa::ToSchema;

use crate::jobs::{Refusal, store::StoreError};

pub type ApiResult<T> = std::result::Result<T, ApiError>;

/// A refusal: one sentence that says what is wrong and what to do.
#[derive(Debug, Clone)]
pub struct ApiError {
    pub status: StatusCode,
    /// In words that programs tell apart.
    pub kind: &'static str,
    pub message: String,
    /// The part of the request that it is about.
    pub param: Option<String>,
    /// Seconds after which to try again.
    pub retry_after: Option<u64>,
    /// Whether to try again at all, where clients would by themselves.
    pub is_final: bool,
}

/// The body of a refused request, as OpenAI's API has it.
#[derive(Serialize, ToSchema)]
pub struct ErrorBody {
    error: ErrorDetail,
}

#[derive(Serialize, ToSchema)]
struct ErrorDetail {
    /// One sentence.
    message: String,
    r#type: &'static str,
    param: Option<String>,
    code: Option<&'static str>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, message: message.into(), param: None, retry_after: None, is_final: false }
    }

    /// The request cannot be served as it is.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid_request_error", message)
    }

    /// The body is not what its content type promises.
    pub fn malformed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    pub fn unsupported_media(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "invalid_request_error", message)
    }

    pub fn too_large(message: impl Into<String>) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", message)
    }

    pub fn too_large_for(max_upload: usize) -> Self {
        Self::too_large(format!(
            "the request is larger than the {max_upload} bytes that are taken (--max-upload); send a smaller image"
        ))
    }

    pub fn too_slow() -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, "timeout", "the body of the request did not arrive in time")
    }

    pub fn no_key() -> Self {
        let message = "this service requires an API key; send it as `x-key: KEY` or `Authorization: Bearer KEY`";
        Self::new(StatusCode::UNAUTHORIZED, "authentication_error", message)
    }

    /// Too much is held in memory for others.
    pub fn busy() -> Self {
        let message = "too much is being sent at once; try again in a moment";
        Self { retry_after: Some(2), ..Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", message) }
    }

    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "forbidden", message)
    }

    pub fn not_found(what: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found", format!("there is no such {what}"))
    }

    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    /// The same request again would end in the same way.
    pub fn final_(mut self) -> Self {
        self.is_final = true;
        self
    }

    /// Names the part of the request that it is about.
    pub fn about(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// The same for a refusal of the queue, which knows when there is room again.
    pub fn from_refusal(refusal: Refusal, retry_after: u64) -> Self {
        let message = refusal.to_string();
        match refusal {
            Refusal::QueueFull(_) => Self {
                retry_after: Some(retry_after),
                ..Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message)
            },
            Refusal::Conflict => {
                Self::new(StatusCode::CONFLICT, "idempotency_error", message).about("Idempotency-Key").final_()
            }
            Refusal::Stopping => {
                Self { retry_after: Some(10), ..Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", message) }
            }
            Refusal::Store(error) => error.into(),
        }
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Full => Self::new(
                StatusCode::INSUFFICIENT_STORAGE,
                "insufficient_storage",
                "the disk of the service is full; free some of it, or remove old jobs",
            ),
            StoreError::Failed(reason) => {
                tracing::error!("{reason}");
                Self::internal("the service could not read or write its jobs; its log says why")
            }
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let Self { status, kind, message, param, retry_after, is_final } = self;
        let body = ErrorBody { error: ErrorDetail { message, r#type: kind, param, code: None } };
        with_headers((status, Json(body)).into_response(), kind, retry_after, is_final)
    }
}

/// What is wrong with a request to the hosted-style routes, in the form that their callers know.
pub struct HostedError(pub ApiError);

/// Its body.
#[derive(Serialize, ToSchema)]
pub struct HostedErrorBody {
    /// One sentence.
    detail: String,
}

impl<E: Into<ApiError>> From<E> for HostedError {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

impl IntoResponse for HostedError {
    fn into_response(self) -> Response {
        let ApiError { status, kind, message, retry_after, is_final, .. } = self.0;
        with_headers((status, Json(HostedErrorBody { detail: message })).into_response(), kind, retry_after, is_final)
    }
}

/// The kind of a refusal, for the counters.
#[derive(Clone, Copy)]
pub struct Kind(pub &'static str);

fn with_headers(mut response: Response, kind: &'static str, retry_after: Option<u64>, is_final: bool) -> Response {
    if let Some(seconds) = retry_after {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    if is_final {
        // OpenAI's clients repeat 409 and 5xx by themselves otherwise.
        response.headers_mut().insert("x-should-retry", HeaderValue::from_static("false"));
    }
    if response.status() == StatusCode::UNAUTHORIZED {
        response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    response.extensions_mut().insert(Kind(kind));
    response
}
