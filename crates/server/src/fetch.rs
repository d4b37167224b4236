//! Requests to addresses that others name: source images and webhooks. Without care, they would make the service a way
//! into the network that it stands in.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use reqwest::{Client, header::LOCATION, redirect::Policy};
use url::{Host, Url};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const TIMEOUT: Duration = Duration::from_secs(20);
const MAX_REDIRECTS: usize = 3;

/// Which addresses may be called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// Those of the public internet.
    Public,
    /// This machine and private networks as well.
    Anywhere,
}

/// Checks the form of an address; whether its host may be called shows when it is.
///
/// # Errors
/// A sentence.
pub fn parse(text: &str) -> Result<Url, String> {
    let url = Url::parse(text).map_err(|e| format!("the URL cannot be read ({e})"))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(format!("the URL begins with {}:; only http: and https: are taken", url.scheme()));
    }
    if url.host().is_none() || !url.username().is_empty() || url.password().is_some() {
        return Err("the URL must name a host, and no user".into());
    }
    Ok(url)
}

/// A client that can reach nothing but the host of `url`, at the addresses that were looked at.
///
/// The name is resolved here, once: one that answers differently the next time gains nothing.
pub async fn client_for(url: &Url, reach: Reach) -> Result<Client, String> {
    let refused =
        |ip: IpAddr| format!("{} is at {ip}, which is not on the public internet", url.host_str().unwrap_or(""));
    let port = url.port_or_known_default().unwrap_or(80);
    let builder = Client::builder()
        .redirect(Policy::none())
        .no_proxy()
        .connect_timeout(CONNECT_TIMEOUT)
        .timeout(TIMEOUT)
        .user_agent(concat!("retouch/", env!("CARGO_PKG_VERSION")));
    let check = |ip: IpAddr| if reach == Reach::Anywhere || is_public(ip) { Ok(()) } else { Err(refused(ip)) };
    let builder = match url.host() {
        Some(Host::Ipv4(ip)) => check(ip.into()).map(|()| builder)?,
        Some(Host::Ipv6(ip)) => check(ip.into()).map(|()| builder)?,
        Some(Host::Domain(name)) => {
            let found = tokio::time::timeout(CONNECT_TIMEOUT, tokio::net::lookup_host((name, port))).await;
            let addresses: Vec<SocketAddr> = match found {
                Ok(Ok(addresses)) => addresses.collect(),
                _ => return Err(format!("the host {name} cannot be found")),
            };
            addresses.iter().try_for_each(|address| check(address.ip()))?;
            builder.resolve_to_addrs(name, &addresses)
        }
        None => return Err("the URL must name a host".into()),
    };
    builder.build().map_err(|e| format!("no connection can be made: {e}"))
}

/// Fetches what is at `url`, `max_bytes` at most; each redirect is looked at as the first address is.
///
/// # Errors
/// A sentence.
pub async fn fetch(mut url: Url, max_bytes: usize, reach: Reach) -> Result<Vec<u8>, String> {
    for _ in 0..=MAX_REDIRECTS {
        let host = url.host_str().unwrap_or_default().to_string();
        let client = client_for(&url, reach).await?;
        let failed = |e: reqwest::Error| {
            let reason = if e.is_timeout() { "it took too long" } else { "the connection failed" };
            format!("nothing could be fetched from {host}: {reason}")
        };
        let mut response = client.get(url.clone()).send().await.map_err(failed)?;
        if response.status().is_redirection() {
            let to = response.headers().get(LOCATION).and_then(|to| to.to_str().ok());
            let to = to.and_then(|to| url.join(to).ok()).ok_or_else(|| format!("{host} redirects to nowhere"))?;
            url = parse(to.as_str())?;
            continue;
        }
        if !response.status().is_success() {
            return Err(format!("{host} answered {}", response.status()));
        }
        let too_large = || format!("what {host} sent is larger than {max_bytes} bytes");
        if response.content_length().is_some_and(|length| length > max_bytes as u64) {
            return Err(too_large());
        }
        let mut bytes = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(failed)? {
            if bytes.len() + chunk.len() > max_bytes {
                return Err(too_large());
            }
            bytes.extend_from_slice(&chunk);
        }
        return Ok(bytes);
    }
    Err(format!("the URL redirects more than {MAX_REDIRECTS} times"))
}

/// Whether an address is one of the public internet: by the registries of special-purpose addresses (RFC 6890).
fn is_public(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => is_public_v4(ip),
        IpAddr::V6(ip) => is_public_v6(ip),
    }
}

fn is_public_v4(ip: Ipv4Addr) -> bool {
    let [a, b, c, _] = ip.octets();
    let special = ip.is_private()
        || ip.is_loopback()
        || ip.is_link_local() // cloud metadata as well
        || ip.is_broadcast()
        || ip.is_documentation()
        || ip.is_multicast()
        || a == 0
        || a >= 240
        || (a == 100 && (64..128).contains(&b)) // carriers' NAT
        || (a == 192 && b == 0 && c == 0)
        || (a == 192 && b == 88 && c == 99)
        || (a == 198 && (b == 18 || b == 19))
        || ip == Ipv4Addr::new(168, 63, 129, 16); // of Azure's platform, from within its machines
    !special
}

fn is_public_v6(ip: Ipv6Addr) -> bool {
    // An address of the other kind inside.
    if let Some(v4) = ip.to_ipv4_mapped() {
        return is_public_v4(v4);
    }
    let [first, second, ..] = ip.segments();
    // Global unicast is 2000::/3; of it, 2001::/23 (Teredo and others), documentation and 6to4 (2002::/16) are special.
    let global = (first & 0xe000) == 0x2000;
    let special = (first == 0x2001 && (second < 0x0200 || second == 0x0db8))
        || first == 0x2002
        || (first == 0x3fff && second < 0x1000);
    global && !special
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_public_addresses_are_public() {
        for ip in ["1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "::ffff:8.8.8.8"] {
            assert!(is_public(ip.parse().unwrap()), "{ip}");
        }
        for ip in [
            "127.0.0.1",
            "127.8.8.8",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "0.0.0.0",
            "100.64.0.1",
            "198.18.0.1",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "192.0.0.8",
            "::1",
            "::",
            "fe80::1",
            "fc00::1",
            "fd00:ec2::254",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "64:ff9b::7f00:1",
            "2002:7f00:1::",
            "2001::1",
            "ff02::1",
            "::127.0.0.1",
            "168.63.129.16",
        ] {
            assert!(!is_public(ip.parse().unwrap()), "{ip}");
        }
    }

    #[test]
    fn urls_of_other_kinds_are_refused() {
        for url in ["file:///etc/passwd", "ftp://example.org/a", "http://user@example.org/", "a.png", "data:,x"] {
            assert!(parse(url).is_err(), "{url}");
        }
        assert!(parse("https://example.org/a.png").is_ok());
    }

    #[tokio::test]
    async fn this_machine_is_not_called_whatever_it_is_called() {
        for url in [
            "http://127.0.0.1/",
            "http://localhost:8090/",
            "http://[::1]/",
            "http://2130706433/",
            "http://0x7f.1/",
            "http://0177.0.0.1/",
            "http://169.254.169.254/latest/meta-data/",
            "http://[::ffff:7f00:1]/",
        ] {
            let url = parse(url).unwrap();
            let refused = client_for(&url, Reach::Public).await.err().unwrap_or_default();
            assert!(refused.contains("public internet"), "{url}: {refused}");
            assert!(client_for(&url, Reach::Anywhere).await.is_ok(), "{url}");
        }
    }
}
