//! Browsers log in with a token, and from then on present a session in a cookie: they can't send a token with each
//! request, least of all with streams of events.

use std::{convert::Infallible, net::SocketAddr, sync::Arc};

use axum::{
    Form, Router,
    body::Body,
    extract::{Extension, FromRequest, Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    middleware::Next,
    response::{Html, IntoResponse, Redirect, Response},
    routing::{get, post},
};

use super::{
    body::{self, Unread},
    json,
};
use crate::{
    api::{Api, Caller, Way},
    listen::Peer,
};

/// The page, with a form that works without scripts.
const PAGE: &str = include_str!("dashboard/login.html");
/// Where the page says why a login has failed.
const PROBLEM: &str = "<!-- problem -->";

/// The paths of the forms.
pub(super) const PATHS: [&str; 2] = [LOGIN, LOGOUT];
const LOGIN: &str = "/login";
const LOGOUT: &str = "/logout";

/// Most bytes of a form: twice those of a JWT.
const MAX_FORM: usize = 16 << 10;

/// The sessions of browsers at one address.
#[derive(Clone)]
pub(super) struct Login {
    api: Api,
    cookie: Arc<Cookie>,
}

/// The cookie with the text of a session. Browsers forget it when they are closed.
struct Cookie {
    name: String,
    is_secure: bool,
}

impl Login {
    /// At this address. With TLS (`is_secure`), no other server can set the cookie, and browsers never send it in
    /// clear. Cookies don't distinguish ports, so the name does.
    ///
    /// <https://datatracker.ietf.org/doc/html/draft-ietf-httpbis-rfc6265bis#name-cookie-name-prefixes>
    pub(super) fn at(address: SocketAddr, is_secure: bool, api: Api) -> Self {
        let prefix = if is_secure { "__Host-" } else { "" };
        let cookie = Cookie { name: format!("{prefix}orc-{}", address.port()), is_secure };
        Self { api, cookie: cookie.into() }
    }

    /// The page and its forms, which are public.
    pub(super) fn routes(self) -> Router {
        Router::new().route(LOGIN, get(page).post(log_in)).route(LOGOUT, post(log_out)).with_state(self)
    }
}

impl Cookie {
    /// Its value in a request. Empty, and so of no session, if there are several.
    fn find<'h>(&self, headers: &'h HeaderMap) -> Option<&'h str> {
        let lines = headers.get_all(header::COOKIE).iter();
        let pairs = lines.flat_map(|line| line.as_bytes().split(|byte| *byte == b';'));
        let named = |pair: &'h [u8]| pair.trim_ascii().strip_prefix(self.name.as_bytes())?.strip_prefix(b"=");
        let mut values = pairs.filter_map(named);
        let value = values.next()?;
        Some(if values.next().is_some() { "" } else { str::from_utf8(value).unwrap_or_default() })
    }

    /// Has a browser keep the text of a session, or forget it if it is empty.
    fn set(&self, text: &str, response: impl IntoResponse) -> Response {
        let Self { name, is_secure } = self;
        let secure = if *is_secure { "; Secure" } else { "" };
        let age = if text.is_empty() { "; Max-Age=0" } else { "" };
        let cookie = format!("{name}={text}; Path=/; HttpOnly; SameSite=Strict{secure}{age}");
        let mut response = response.into_response();
        if let Ok(cookie) = HeaderValue::try_from(cookie) {
            response.headers_mut().insert(header::SET_COOKIE, cookie);
        }
        response
    }
}

/// Records who sends a request: by its headers and its cookie, and by its connection.
pub(super) async fn identify(State(login): State<Login>, mut request: Request, next: Next) -> Response {
    let peer = request.extensions().get::<Peer>().cloned().unwrap_or_default();
    let headers = request.headers();
    let caller = Caller::of(Way::Admin, peer, headers);
    let caller = match login.cookie.find(headers) {
        Some(text) => login.api.in_session(caller, text),
        None => caller,
    };
    request.extensions_mut().insert(caller);
    next.run(request).await
}

/// Lets callers that may read have the dashboard, and leads browsers of others to the page.
pub(super) async fn admit(
    State(login): State<Login>,
    Extension(caller): Extension<Caller>,
    request: Request,
    next: Next,
) -> Response {
    let Err(status) = login.api.check_dashboard(&caller) else { return next.run(request).await };
    let headers = request.headers();
    let accepts = headers.get(header::ACCEPT).and_then(|accepted| accepted.to_str().ok()).unwrap_or_default();
    if !accepts.contains("text/html") {
        return json::refused(&status);
    }
    match json::parts(&status) {
        (StatusCode::UNAUTHORIZED, ..) if login.cookie.find(headers).is_some() => {
            login.cookie.set("", Redirect::to(LOGIN))
        }
        (StatusCode::UNAUTHORIZED, ..) => Redirect::to(LOGIN).into_response(),
        (code, _, message) => with_problem(code, message),
    }
}

async fn page(State(login): State<Login>) -> Response {
    if login.api.reads_credentials() { Html(PAGE).into_response() } else { Redirect::to("/").into_response() }
}

fn with_problem(code: StatusCode, problem: &str) -> Response {
    let escaped = problem.replace('&', "&amp;").replace('<', "&lt;");
    let problem = format!("<p class=\"problem\" role=\"alert\">{escaped}</p>");
    (code, Html(PAGE.replace(PROBLEM, &problem))).into_response()
}

async fn log_in(State(login): State<Login>, Extension(caller): Extension<Caller>, request: Request) -> Response {
    if !login.api.reads_credentials() {
        return Redirect::to("/").into_response();
    }
    let earlier = login.cookie.find(request.headers()).map(str::to_owned);
    let fields = match read(request).await {
        Ok(fields) => fields,
        Err((code, problem)) => return with_problem(code, &problem),
    };
    let token = fields.iter().find(|(name, _)| name == "token").map_or("", |(_, token)| token.trim());
    let refused = match login.api.log_in(caller, token).await {
        Ok(text) => {
            if let Some(earlier) = earlier {
                login.api.log_out(&earlier);
            }
            return login.cookie.set(&text, Redirect::to("/"));
        }
        Err(refused) => refused,
    };
    let (code, reason, message) = json::parts(&refused);
    with_problem(
        code,
        match reason.as_str() {
            "CREDENTIAL_MISSING" => "Enter a token.",
            "CREDENTIAL_EXPIRED" => "This token has expired.",
            "CREDENTIAL_INVALID" => "This token is not valid: it is unknown, or it was removed or revoked.",
            _ => message,
        },
    )
}

/// The fields of a form. Otherwise the status, and what is wrong.
async fn read(request: Request) -> Result<Vec<(String, String)>, (StatusCode, String)> {
    let (head, body) = request.into_parts();
    let form = body::read(body, MAX_FORM, |_| Ok::<_, Infallible>(())).await.map_err(|unread| match unread {
        Unread::TooLong(max) => (StatusCode::PAYLOAD_TOO_LARGE, format!("The form is longer than {max} bytes.")),
        Unread::Late => (StatusCode::REQUEST_TIMEOUT, "The form has not arrived in time.".to_owned()),
        Unread::Broken(error) => (StatusCode::BAD_REQUEST, error.to_string()),
        Unread::NoRoom(never) => match never {},
    })?;
    let request = Request::from_parts(head, Body::from(form));
    let Form(fields) = Form::from_request(request, &()).await.map_err(|it| (it.status(), it.body_text()))?;
    Ok(fields)
}

async fn log_out(State(login): State<Login>, headers: HeaderMap) -> Response {
    if let Some(text) = login.cookie.find(&headers) {
        login.api.log_out(text);
    }
    login.cookie.set("", Redirect::to(LOGIN))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cookie_is_found_among_others_and_only_if_it_is_the_only_one_of_its_name() {
        let cookie = Cookie { name: "orc-1".into(), is_secure: false };
        let find = |lines: &[&[u8]]| {
            let mut headers = HeaderMap::new();
            for line in lines {
                headers.append(header::COOKIE, HeaderValue::from_bytes(line).unwrap());
            }
            cookie.find(&headers).map(str::to_owned)
        };
        for lines in [&[&b"orc-1=x"[..]][..], &[b"a=\xff;  orc-1=x ; b"], &[b"orc-11=y; xorc-1=y", b"orc-1=x"]] {
            assert_eq!(find(lines).as_deref(), Some("x"), "{lines:?}");
        }
        for lines in [&[][..], &[&b"orc-2=x"[..]], &[b"orc-1"], &[b"a=orc-1=x"]] {
            assert_eq!(find(lines), None, "{lines:?}");
        }
        for lines in [&[&b"orc-1=x; orc-1=x"[..]][..], &[b"orc-1=\xff"], &[b"orc-1="]] {
            assert_eq!(find(lines).as_deref(), Some(""), "{lines:?}");
        }
    }
}
