use super::super::secret::Secret;
use super::*;
use std::sync::{Arc, Mutex};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

const SECRET: &str = "what both ends know";

fn credentials(secret: &str) -> Credentials {
    Credentials::new(&Secret::given(secret.to_owned()).expect("long enough")).expect("credentials")
}

async fn here() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound");
    (listener, address)
}

/// A machine that lets one caller in, and then says what it hears.
async fn echo() -> (SocketAddr, JoinHandle<io::Result<()>>) {
    let (listener, address) = here().await;
    let echo = async move {
        let (connection, _) = listener.accept().await?;
        let mut stream = answer(connection, &credentials(SECRET)).await?;
        let mut heard = [0; 64];
        stream.read_exact(&mut heard).await?;
        stream.write_all(&heard).await?;
        stream.flush().await
    };
    (address, tokio::spawn(echo))
}

/// Who says these bytes to whoever calls, and then listens.
async fn says(bytes: &'static [u8]) -> SocketAddr {
    let (listener, address) = here().await;
    tokio::spawn(async move {
        let (mut connection, _) = listener.accept().await.expect("a caller");
        connection.write_all(bytes).await.expect("says it");
        let _ = connection.read_to_end(&mut Vec::new()).await;
    });
    address
}

/// Somebody between a caller and the machine at `to`, who keeps what they say.
async fn listen_in(to: SocketAddr) -> (SocketAddr, Arc<Mutex<Vec<u8>>>) {
    let (listener, address) = here().await;
    let heard = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&heard);
    tokio::spawn(async move {
        let (caller, _) = listener.accept().await.expect("a caller");
        let called = TcpStream::connect(to).await.expect("the machine");
        let (caller, called) = (caller.into_split(), called.into_split());
        tokio::join!(
            pass_on(caller.0, called.1, Arc::clone(&kept)),
            pass_on(called.0, caller.1, kept)
        );
    });
    (address, heard)
}

async fn pass_on(
    mut from: impl tokio::io::AsyncRead + Unpin,
    mut to: impl tokio::io::AsyncWrite + Unpin,
    kept: Arc<Mutex<Vec<u8>>>,
) {
    let mut buffer = [0; 4096];
    while let Ok(bytes @ 1..) = from.read(&mut buffer).await {
        kept.lock().expect("not poisoned").extend_from_slice(&buffer[..bytes]);
        to.write_all(&buffer[..bytes]).await.expect("passes on");
    }
}

fn contains(heard: &[u8], text: &[u8]) -> bool {
    heard.windows(text.len()).any(|window| window == text)
}

async fn refusal(address: SocketAddr, secret: &str) -> LinkError {
    dial(address, &credentials(secret)).await.expect_err("not let in")
}

#[tokio::test]
async fn who_knows_the_secret_is_let_in_and_with_tls_nobody_can_listen_in() {
    let (machine, echo) = echo().await;
    let (between, heard) = listen_in(machine).await;
    let (mut stream, local) = dial(between, &credentials(SECRET)).await.expect("let in");
    assert!(local.ip().is_loopback());
    let payload = [b'p'; 64];
    let mut back = [0; 64];
    stream.write_all(&payload).await.expect("writes");
    stream.flush().await.expect("writes");
    stream.read_exact(&mut back).await.expect("reads");
    assert_eq!(back, payload);
    echo.await.expect("no panic").expect("no error");
    let heard = heard.lock().expect("not poisoned");
    let is_clear = cfg!(not(feature = "tls"));
    assert_eq!(contains(&heard, &payload), is_clear);
    assert_eq!(contains(&heard, SECRET.as_bytes()), is_clear);
}

#[tokio::test]
async fn who_has_another_secret_is_told_so() {
    let (machine, echo) = echo().await;
    let error = refusal(machine, "what nobody else knows").await;
    assert!(matches!(error, LinkError::OtherSecret { address } if address == machine), "{error}");
    assert!(error.to_string().contains("set MOBULA_SECRET alike"), "{error}");
    echo.await.expect("no panic").expect_err("nobody was let in");
}

#[tokio::test]
async fn a_program_that_was_built_otherwise_is_named_as_such() {
    let (other, text) = match cfg!(feature = "tls") {
        true => (&CLEAR, "built without the feature `tls`, and this one with it"),
        false => (&TLS, "built with the feature `tls`, and this one without it"),
    };
    let error = refusal(says(other).await, SECRET).await.to_string();
    assert!(error.contains(text), "{error}");
    let error = refusal(says(b"SSH-2.0-OpenSSH_9.9\r\n").await, SECRET).await.to_string();
    assert!(error.contains("SSH-2.0-OpenSSH_"), "{error}");
}

#[tokio::test]
async fn a_machine_that_is_not_there_or_goes_away_is_named() {
    let (listener, nobody) = here().await;
    drop(listener);
    let error = refusal(nobody, SECRET).await;
    assert!(matches!(error, LinkError::Unreachable { .. }), "{error}");
    let (listener, address) = here().await;
    tokio::spawn(async move { drop(listener.accept().await) });
    let error = refusal(address, SECRET).await;
    assert!(matches!(error, LinkError::Broke { .. }), "{error}");
}

/// What strangers may say first: gRPC in clear text, a TLS hello, HTTP. None of them waits long.
#[tokio::test]
async fn callers_who_talk_otherwise_are_hung_up_on() {
    for words in [
        &b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..],
        b"\x16\x03\x01\x00\x05hello",
        b"GET / HTTP/1.1\r\n\r\n",
    ] {
        let (machine, echo) = echo().await;
        let mut caller = TcpStream::connect(machine).await.expect("listens");
        caller.write_all(words).await.expect("says it");
        echo.await.expect("no panic").expect_err("not let in");
    }
}

#[tokio::test]
async fn who_says_nothing_is_hung_up_on() {
    let (machine, echo) = echo().await;
    let mut caller = TcpStream::connect(machine).await.expect("listens");
    let error = echo.await.expect("no panic").expect_err("not let in");
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    caller.read_to_end(&mut Vec::new()).await.expect("nobody is there any more");
}
