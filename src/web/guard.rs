//! Access control for readers, and the restrictions of browsers.

use axum::{
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, Method, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};

use super::login;

/// Only the dashboard's own scripts and styles.
const CONTENT_SECURITY_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; \
                                       connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'";

#[derive(Clone, Copy, Debug)]
pub(super) struct Guard {
    /// True if the address is exposed beyond loopback, so that it may have any name.
    pub(super) beyond_loopback: bool,
    /// True if the address has TLS.
    pub(super) is_secure: bool,
}

/// Accepts only requests that a person or a program on this machine makes itself.
///
/// A page of another site that is open in a local browser can send requests to loopback addresses, and read the answers
/// if its name resolves to such an address (DNS rebinding). The name in `Host` and the browser's `Sec-Fetch-Site`
/// reveal such requests. A browser may change something only from a page of this address itself, as `Origin` tells,
/// which browsers send with each such request: a cookie is sent to all ports of a host, for pages of all of them.
pub(super) async fn check(State(guard): State<Guard>, request: Request, next: Next) -> Response {
    let (method, headers) = (request.method(), request.headers());
    let reads = matches!(*method, Method::GET | Method::HEAD);
    let is_form = *method == Method::POST && login::PATHS.contains(&request.uri().path());
    let mut response = if !guard.beyond_loopback && !is_local(headers) {
        (StatusCode::FORBIDDEN, "the name in Host is not a loopback name; use localhost\n").into_response()
    } else if is_cross_site(headers) {
        (StatusCode::FORBIDDEN, "pages of other sites may not use this address\n").into_response()
    } else if !reads && (is_form || is_of_browser(headers)) && !is_of_same_origin(headers, guard.is_secure) {
        let problem = "a browser may change something only from a page of this address, as the header Origin tells; \
                       programs send no Origin and no Cookie\n";
        (StatusCode::FORBIDDEN, problem).into_response()
    } else {
        next.run(request).await
    };
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, CONTENT_SECURITY_POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        // With `no-referrer`, browsers would not send the origin of forms either.
        (header::REFERRER_POLICY, "same-origin"),
        (header::HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}

fn is_local(headers: &HeaderMap) -> bool {
    let Some(host) = headers.get(header::HOST).and_then(|host| host.to_str().ok()) else { return false };
    let Ok(authority) = host.parse::<axum::http::uri::Authority>() else { return false };
    let name = authority.host().trim_start_matches('[').trim_end_matches(']');
    if let Ok(ip) = name.parse::<std::net::IpAddr>() {
        return ip.to_canonical().is_loopback();
    }
    let name = name.to_ascii_lowercase();
    name == "localhost" || name.ends_with(".localhost")
}

/// True if a browser reports another site. A navigation is allowed: it shows the page, and no other page can read it.
fn is_cross_site(headers: &HeaderMap) -> bool {
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    header("sec-fetch-site") == Some("cross-site") && header("sec-fetch-mode") != Some("navigate")
}

/// True if a browser may have sent a request that is not a GET.
fn is_of_browser(headers: &HeaderMap) -> bool {
    [header::ORIGIN, header::COOKIE, header::HeaderName::from_static("sec-fetch-site")]
        .iter()
        .any(|name| headers.contains_key(name))
}

/// True if a request comes from a page of the server that it is sent to. Without TLS here, a proxy may add it.
fn is_of_same_origin(headers: &HeaderMap, is_secure: bool) -> bool {
    let header = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let (Some(origin), Some(host)) = (header(header::ORIGIN), header(header::HOST)) else { return false };
    let plain = origin.strip_prefix("http://").filter(|_| !is_secure);
    let authority = plain.or_else(|| origin.strip_prefix("https://"));
    authority.is_some_and(|authority| authority.eq_ignore_ascii_case(host))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_this_machine_are_local() {
        let is_local = |host: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::HOST, host.parse().unwrap());
            super::is_local(&headers)
        };
        for host in ["localhost", "LocalHost:7780", "127.0.0.1:7780", "[::1]:7780", "a.localhost:1"] {
            assert!(is_local(host), "{host}");
        }
        for host in ["evil.example", "evil.example:7780", "10.0.0.1", "localhost.evil.example", ""] {
            assert!(!is_local(host), "{host}");
        }
    }

    #[test]
    fn forms_come_from_the_same_origin() {
        let is_same = |origin: &str, host: &str, is_secure| {
            let mut headers = HeaderMap::new();
            headers.insert(header::ORIGIN, origin.parse().unwrap());
            headers.insert(header::HOST, host.parse().unwrap());
            is_of_same_origin(&headers, is_secure)
        };
        assert!(is_same("http://localhost:7780", "localhost:7780", false));
        assert!(is_same("https://Core.example", "core.example", true) && is_same("https://a", "a", false));
        for (origin, host, is_secure) in [
            ("null", "localhost:7780", false),
            ("http://localhost:7781", "localhost:7780", false),
            ("http://localhost", "localhost:7780", false),
            ("http://evil.example", "localhost:7780", false),
            ("http://localhost:7780.evil.example", "localhost:7780", false),
            ("http://core.example", "core.example", true),
            ("ftp://localhost:7780", "localhost:7780", false),
        ] {
            assert!(!is_same(origin, host, is_secure), "{origin}");
        }
        assert!(!is_of_same_origin(&HeaderMap::new(), false));
    }
}
