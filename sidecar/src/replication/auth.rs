//! Login: the startup message and authentication.
//!
//! A password is sent in clear text only over TLS or a unix socket. A server that starts SCRAM must finish it, by
//! which it proves that it knows the password, too. With `channel_binding=require` nothing is sent for any other
//! method, and with `require_auth` nothing for a method that it does not list.

use super::{
    error::{Error, ErrorKind, ServerError},
    rows::unexpected,
    wire::Wire,
};
use crate::conninfo::{ChannelBinding, Password, RequireAuth};
use bytes::{Buf, Bytes};
use postgres_protocol::{
    authentication::{md5_hash, sasl},
    message::frontend,
};

const OP: &str = "log in";

/// The identity to log in with.
pub(super) struct Login<'a> {
    pub user: &'a str,
    pub password: Option<Password>,
    pub channel_binding: ChannelBinding,
    pub require_auth: &'a RequireAuth,
    /// The `tls-server-end-point` of this connection, if it has one.
    pub end_point: Option<Vec<u8>>,
}

/// Sends `parameters`, authenticates, and waits until the server is ready for queries.
pub(super) async fn log_in(
    wire: &mut Wire,
    parameters: &[(&str, &str)],
    login: &Login<'_>,
) -> Result<(), Error> {
    let bad = |e: std::io::Error| Error::protocol(OP, e.to_string());
    frontend::startup_message(parameters.iter().copied(), wire.output()).map_err(bad)?;
    authenticate(wire, login).await?;
    loop {
        let frame = wire.receive(OP).await?;
        match frame.tag {
            b'Z' => return Ok(()),
            b'K' => {
                let pid = frame.body.get(..4).and_then(|pid| pid.try_into().ok());
                wire.set_peer_pid(pid.map(u32::from_be_bytes));
            }
            b'E' => return Err(Error::from_server(OP, ServerError::parse(&frame.body))),
            tag => return Err(unexpected(OP, "the server to be ready", tag)),
        }
    }
}

async fn authenticate(wire: &mut Wire, login: &Login<'_>) -> Result<(), Error> {
    let (code, body) = request(wire).await?;
    login.require_auth.allows(code).map_err(refuse)?;
    if code != 10 && login.channel_binding == ChannelBinding::Require {
        return Err(refuse(format!(
            "channel_binding=require: expected SCRAM-SHA-256-PLUS, found {}",
            method(code)
        )));
    }
    match code {
        0 => return Ok(()),
        3 if wire.transport().is_private() => {
            send_password(wire, password(login)?.reveal().as_bytes())?;
        }
        3 => {
            return Err(refuse(
                "server requests the password in clear text over an unencrypted connection".into(),
            ));
        }
        5 => {
            let salt = body.get(..4).and_then(|s| s.try_into().ok());
            let salt = salt.ok_or_else(|| Error::protocol(OP, "expected 4 bytes of salt"))?;
            let password = password(login)?.reveal().as_bytes();
            send_password(wire, md5_hash(login.user.as_bytes(), password, salt).as_bytes())?;
        }
        10 => scram(wire, login, &body).await?,
        code => {
            return Err(refuse(format!(
                "expected authentication by password, SCRAM or certificate, found {}",
                method(code)
            )));
        }
    }
    match request(wire).await? {
        (0, _) => Ok(()),
        (code, _) => Err(Error::protocol(
            OP,
            format!("expected the login to succeed, found {}", method(code)),
        )),
    }
}

/// The next authentication request: its code and the rest of its body.
async fn request(wire: &mut Wire) -> Result<(u32, Bytes), Error> {
    loop {
        let mut frame = wire.receive(OP).await?;
        match frame.tag {
            b'R' => {
                let short = |_| Error::protocol(OP, "expected an authentication request");
                return Ok((frame.body.try_get_u32().map_err(short)?, frame.body));
            }
            b'E' => return Err(Error::from_server(OP, ServerError::parse(&frame.body))),
            // NegotiateProtocolVersion: the server supports a lower version than ours, which is the lowest, so
            // nothing changes.
            b'v' => {}
            tag => return Err(unexpected(OP, "an authentication request", tag)),
        }
    }
}

async fn scram(wire: &mut Wire, login: &Login<'_>, mechanisms: &[u8]) -> Result<(), Error> {
    let offers = |name: &str| mechanisms.split(|b| *b == 0).any(|m| m == name.as_bytes());
    let (mechanism, binding) = choose(login, offers)?;
    let password = password(login)?.reveal().as_bytes();
    let bad = |e: std::io::Error| Error::protocol(OP, e.to_string());

    let mut scram = sasl::ScramSha256::new(password, binding);
    frontend::sasl_initial_response(mechanism, scram.message(), wire.output()).map_err(bad)?;
    scram.update(&sasl_answer(wire, 11).await?).map_err(bad)?;
    frontend::sasl_response(scram.message(), wire.output()).map_err(bad)?;
    let last = sasl_answer(wire, 12).await?;
    scram.finish(&last).map_err(|e| {
        refuse(format!("expected the server to prove that it knows the password: {e}"))
    })
}

/// Uses channel binding if both sides can. If the server seems not to offer it, it is told that we could, so that it
/// notices a man in the middle who removed the offer.
fn choose(
    login: &Login<'_>,
    offers: impl Fn(&str) -> bool,
) -> Result<(&'static str, sasl::ChannelBinding), Error> {
    let wanted = login.channel_binding != ChannelBinding::Disable;
    match &login.end_point {
        Some(hash) if wanted && offers(sasl::SCRAM_SHA_256_PLUS) => {
            let binding = sasl::ChannelBinding::tls_server_end_point(hash.clone());
            Ok((sasl::SCRAM_SHA_256_PLUS, binding))
        }
        _ if login.channel_binding == ChannelBinding::Require => Err(refuse(
            "channel_binding=require: expected a TLS connection to a server that offers \
             SCRAM-SHA-256-PLUS, found none"
                .into(),
        )),
        _ if !offers(sasl::SCRAM_SHA_256) => {
            Err(refuse("expected the server to offer SCRAM-SHA-256, found other methods".into()))
        }
        Some(_) if wanted => Ok((sasl::SCRAM_SHA_256, sasl::ChannelBinding::unrequested())),
        _ => Ok((sasl::SCRAM_SHA_256, sasl::ChannelBinding::unsupported())),
    }
}

async fn sasl_answer(wire: &mut Wire, expected: u32) -> Result<Bytes, Error> {
    match request(wire).await? {
        (code, body) if code == expected => Ok(body),
        (code, _) => Err(Error::protocol(
            OP,
            format!("expected {}, found {}", method(expected), method(code)),
        )),
    }
}

fn password<'a>(login: &'a Login<'_>) -> Result<&'a Password, Error> {
    login.password.as_ref().ok_or_else(|| {
        refuse(format!("server requests the password of user {:?}, found none", login.user))
    })
}

fn send_password(wire: &mut Wire, text: &[u8]) -> Result<(), Error> {
    frontend::password_message(text, wire.output())
        .map_err(|_| refuse("expected a password without NUL bytes".into()))
}

fn refuse(message: String) -> Error {
    Error::new(ErrorKind::Auth, OP, message)
}

fn method(code: u32) -> String {
    match code {
        0 => "no authentication".into(),
        2 => "Kerberos".into(),
        3 => "password in clear text".into(),
        5 => "md5".into(),
        7 | 8 => "GSSAPI".into(),
        9 => "SSPI".into(),
        10 => "start of SASL".into(),
        11 => "continuation of SASL".into(),
        12 => "end of SASL".into(),
        code => format!("authentication request {code}"),
    }
}
