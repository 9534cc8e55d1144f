//! Who may do what, and what the admin port says.

mod admin_http;
mod certificates;
mod check;
mod roles;
