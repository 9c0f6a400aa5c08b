//! What a request has and is answered with, as the `OpenAPI` document describes it.

use std::borrow::Cow;

use utoipa::openapi::schema::Schema as Description;
use utoipa::openapi::{Components, Ref, RefOr};
use utoipa::{PartialSchema, ToSchema};

/// The description of a type for the `OpenAPI` document.
#[derive(Clone, Copy)]
pub struct Schema {
    name: fn() -> Cow<'static, str>,
    own: fn() -> RefOr<Description>,
    nested: fn(&mut Vec<(String, RefOr<Description>)>),
}

impl Schema {
    pub(super) fn of<T: ToSchema>() -> Self {
        Self {
            name: T::name,
            own: <T as PartialSchema>::schema,
            nested: T::schemas,
        }
    }

    /// Adds the type, and those that it is made of, and returns a reference to it.
    pub fn add_to(self, components: &mut Components) -> Ref {
        let name = (self.name)();
        let mut described = vec![(name.clone().into_owned(), (self.own)())];
        (self.nested)(&mut described);
        components.schemas.extend(described);
        Ref::from_schema_name(name)
    }
}

/// What a request has.
#[derive(Clone, Copy)]
pub struct RequestBody {
    /// Of which type it is.
    pub schema: Schema,
    /// Whether the request is refused without it.
    pub is_required: bool,
}

impl RequestBody {
    pub(super) fn required<T: ToSchema>() -> Self {
        Self {
            schema: Schema::of::<T>(),
            is_required: true,
        }
    }

    pub(super) fn optional<T: ToSchema>() -> Self {
        Self {
            is_required: false,
            ..Self::required::<T>()
        }
    }
}

/// What a request that is done is answered with.
#[derive(Clone, Copy)]
pub enum Answer {
    /// 204: nothing.
    Nothing,
    /// 200: JSON.
    Json(Schema),
    /// 200: metrics as text.
    Metrics,
}
