use super::*;
use tokio::io::{AsyncReadExt, DuplexStream, duplex};

fn secret(text: &str) -> Secret {
    Secret::given(text.to_owned()).expect("long enough")
}

fn public(text: &str) -> CertificateDer<'static> {
    let key = key(&secret(text)).expect("a key");
    key.end_entity_cert().expect("a public key").clone().into_owned()
}

/// What the server says of a client, both ends in this process.
async fn accept(client: ClientConfig, server: &str) -> (io::Result<()>, io::Result<()>) {
    let (here, there) = duplex(1 << 16);
    let acceptor = Credentials::new(&secret(server)).expect("credentials").acceptor;
    let name = ServerName::try_from("mobula").expect("a name");
    let connect = async {
        let mut stream: tokio_rustls::client::TlsStream<DuplexStream> =
            TlsConnector::from(Arc::new(client)).connect(name, here).await?;
        // In TLS 1.3 it is only here that a client hears that it was refused.
        stream.read_u8().await.map(|_| ())
    };
    let accept = async {
        let mut stream = acceptor.accept(there).await?;
        tokio::io::AsyncWriteExt::write_all(&mut stream, &[1]).await?;
        tokio::io::AsyncWriteExt::flush(&mut stream).await
    };
    tokio::join!(connect, accept)
}

#[test]
fn the_key_is_a_function_of_the_secret() {
    assert_eq!(public("one secret of many"), public("one secret of many"));
    assert_ne!(public("one secret of many"), public("one secret of manz"));
    // HMAC-SHA256 and Ed25519 of somebody else give the same.
    let spki = public("one secret of many");
    let hex: String = spki.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(
        hex,
        "302a300506032b6570032100e0d4276410579ffa36f466684ed016f0925b1d3fe15eeed1971aca396eadf8b1"
    );
}

#[tokio::test]
async fn the_same_key_is_let_in() {
    let key = key(&secret("one secret of many")).expect("a key");
    let (client, server) = accept(client(&key).expect("a client"), "one secret of many").await;
    client.expect("let in");
    server.expect("lets in");
}

/// One that would take any server.
#[derive(Debug)]
struct Gullible(SameKey);

impl ServerCertVerifier for Gullible {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(only_tls_1_3())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        shown: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.check_signature(message, shown, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

fn gullible(mine: Option<Arc<CertifiedKey>>) -> ClientConfig {
    let provider = Arc::new(provider::default_provider());
    let key = key(&secret("what nobody else knows")).expect("a key");
    let same = SameKey::new(&key, &provider).expect("a verifier");
    let client = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .expect("TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Gullible(same)));
    match mine {
        Some(key) => {
            client.with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(key)))
        }
        None => client.with_no_client_auth(),
    }
}

#[tokio::test]
async fn a_client_without_a_key_or_with_another_one_is_refused() {
    let (client, server) = accept(gullible(None), "one secret of many").await;
    client.expect_err("refused");
    server.expect_err("refuses");
    let other = key(&secret("what nobody else knows")).expect("a key");
    let (client, server) = accept(gullible(Some(other)), "one secret of many").await;
    client.expect_err("refused");
    assert!(is_other_key(&server.expect_err("refuses")));
}

/// The public key is seen by whoever connects: it opens nothing without its private half.
#[tokio::test]
async fn a_client_that_only_has_the_public_key_is_refused() {
    let other = key(&secret("what nobody else knows")).expect("a key");
    let copied = CertifiedKey::new(vec![public("one secret of many")], Arc::clone(&other.key));
    let (client, server) = accept(gullible(Some(Arc::new(copied))), "one secret of many").await;
    client.expect_err("refused");
    let error = server.expect_err("refuses");
    assert!(error.to_string().contains("BadSignature"), "{error}");
}
