//! The guest's own API below `/vms/{id}/` in the `OpenAPI` document, made of the table by which it is served.

use control::api::{Answer, GUEST_OPERATIONS, GuestOperation, LifeEffect, RequestMethod};
use control::metrics;
use utoipa::ToSchema;
use utoipa::openapi::content::ContentBuilder;
use utoipa::openapi::path::{
    HttpMethod, OperationBuilder, ParameterBuilder, ParameterIn, PathItem, PathItemBuilder,
};
use utoipa::openapi::request_body::RequestBodyBuilder;
use utoipa::openapi::schema::{ObjectBuilder, Type};
use utoipa::openapi::{Components, OpenApi, Ref, Required, Response, ResponseBuilder};

use super::fault::FaultBody;

/// The tag of these operations.
pub(super) const TAG: &str = "the guest's own API";
/// Where the daemon has what a guest's own socket has at `/`.
const PREFIX: &str = "/vms/{id}";

/// Why a request is not carried out.
const REFUSALS: [(&str, &str); 8] = [
    ("400", "The guest's process refuses."),
    ("404", "There is no such guest."),
    (
        "409",
        "The guest has no process, or its state does not allow it.",
    ),
    ("413", "The body is too long."),
    ("502", "The answer of the guest's process cannot be read."),
    ("503", "The daemon ends, or has too much to do."),
    ("504", "The guest's process has not answered in time."),
    ("507", "There is no room for it."),
];
/// Beside these, where a guest can start by it.
const NOT_STARTED: (&str, &str) = ("422", "The guest could not start, and waits as before.");

/// Adds the operations of a guest to the document.
pub(super) fn add_to(document: &mut OpenApi) {
    let mut components = document.components.take().unwrap_or_default();
    for operation in &GUEST_OPERATIONS {
        let path = format!("{PREFIX}{}", operation.path);
        let described = describe(operation, &mut components);
        let paths = &mut document.paths.paths;
        match paths.get_mut(&path) {
            Some(item) => item.merge_operations(described),
            None => drop(paths.insert(path, described)),
        }
    }
    document.components = Some(components);
}

fn method(method: RequestMethod) -> HttpMethod {
    match method {
        RequestMethod::Get => HttpMethod::Get,
        RequestMethod::Put => HttpMethod::Put,
        RequestMethod::Patch => HttpMethod::Patch,
    }
}

fn json_body(schema: Ref) -> utoipa::openapi::Content {
    ContentBuilder::new().schema(Some(schema)).build()
}

fn parameter(name: &str, description: &str) -> ParameterBuilder {
    ParameterBuilder::new()
        .name(name)
        .parameter_in(ParameterIn::Path)
        .required(Required::True)
        .description(Some(description))
        .schema(Some(ObjectBuilder::new().schema_type(Type::String)))
}

/// A name of its own among all operations, for programs that make clients of the document.
fn operation_id(operation: &GuestOperation) -> String {
    let words = |c: char| !c.is_ascii_alphanumeric();
    let path = operation.path.split(words).filter(|word| !word.is_empty());
    let method = operation.method.as_str().to_lowercase();
    let words = ["guest"].into_iter().chain(path);
    format!("{method}_{}", words.collect::<Vec<_>>().join("_"))
}

fn done(operation: &GuestOperation, components: &mut Components) -> (&'static str, Response) {
    let done = ResponseBuilder::new().description("Done.");
    match operation.answer() {
        Answer::Nothing => ("204", done.build()),
        Answer::Json(schema) => {
            let content = json_body(schema.add_to(components));
            ("200", done.content("application/json", content).build())
        }
        Answer::Metrics => {
            let text = ObjectBuilder::new().schema_type(Type::String);
            let content = ContentBuilder::new().schema(Some(text)).build();
            ("200", done.content(metrics::CONTENT_TYPE, content).build())
        }
    }
}

fn describe(operation: &GuestOperation, components: &mut Components) -> PathItem {
    let mut described = OperationBuilder::new()
        .tag(TAG)
        .operation_id(Some(operation_id(operation)))
        .summary(Some(operation.summary))
        .parameter(parameter("id", "The guest."));
    if let Some(name) = operation.parameter() {
        described = described.parameter(parameter(name, "Its name or number."));
    }
    if let Some(body) = operation.body() {
        let content = json_body(body.schema.add_to(components));
        let required = if body.is_required {
            Required::True
        } else {
            Required::False
        };
        let body = RequestBodyBuilder::new()
            .content("application/json", content)
            .required(Some(required));
        described = described.request_body(Some(body.build()));
    }
    let (code, answer) = done(operation, components);
    described = described.response(code, answer);
    let starts = (operation.life == LifeEffect::CanStart).then_some(NOT_STARTED);
    for (code, why) in REFUSALS.into_iter().chain(starts) {
        let content = json_body(Ref::from_schema_name(FaultBody::name()));
        let refusal = ResponseBuilder::new()
            .description(why)
            .content("application/json", content);
        described = described.response(code, refusal);
    }
    let item = PathItemBuilder::new();
    item.operation(method(operation.method), described).build()
}
