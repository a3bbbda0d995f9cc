//! TLS 1.3 without certificates: the secret gives a key pair, each end shows its public key (RFC 7250)
//! and lets in who has the same one. The secret never travels.
//!
//! Whoever connects sees the public key, and can try secrets against it at leisure: [`Secret`]
//! refuses short ones.

use super::secret::{Secret, is_same};
use crate::Error;
use ring::hmac;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{AlwaysResolvesClientRawPublicKeys, Resumption};
use rustls::crypto::{CryptoProvider, ring as provider, verify_tls13_signature_with_raw_key};
use rustls::pki_types::{
    CertificateDer, PrivatePkcs8KeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime,
};
use rustls::server::AlwaysResolvesServerRawPublicKeys;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::CertifiedKey;
use rustls::version::TLS13;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, PeerIncompatible,
    ServerConfig, SignatureScheme,
};
use std::io;
use std::sync::Arc;
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

pub(super) type Stream = tokio_rustls::TlsStream<TcpStream>;

/// What the key pair is for: the secret may be used otherwise too.
const CONTEXT: &[u8] = b"mobula tls 1";
/// The only protocol inside.
const ALPN: &[u8] = b"h2";
/// PKCS #8 of an Ed25519 key (RFC 8410), but for its 32 bytes.
const PKCS8: &[u8] = b"\x30\x2e\x02\x01\x00\x30\x05\x06\x03\x2b\x65\x70\x04\x22\x04\x20";

#[derive(Clone)]
pub(super) struct Credentials {
    connector: TlsConnector,
    acceptor: TlsAcceptor,
}

impl Credentials {
    pub(super) fn new(secret: &Secret) -> Result<Self, Error> {
        let failed =
            |error| Error::system("setting up TLS", io::Error::other::<rustls::Error>(error));
        let key = key(secret).map_err(failed)?;
        let connector = Arc::new(client(&key).map_err(failed)?).into();
        let acceptor = Arc::new(server(&key).map_err(failed)?).into();
        Ok(Self { connector, acceptor })
    }

    /// The caller's side. `None`: the other end has another secret.
    pub(super) async fn show(&self, connection: TcpStream) -> io::Result<Option<Stream>> {
        // Not sent: who is meant is whoever has the key.
        let name = ServerName::try_from("mobula").map_err(io::Error::other)?;
        known(self.connector.connect(name, connection).await.map(Stream::from))
    }

    /// The other side. `None`: the caller has another secret.
    pub(super) async fn check(&self, connection: TcpStream) -> io::Result<Option<Stream>> {
        known(self.acceptor.accept(connection).await.map(Stream::from))
    }
}

fn known(shaken: io::Result<Stream>) -> io::Result<Option<Stream>> {
    match shaken {
        Ok(stream) => Ok(Some(stream)),
        Err(error) if is_other_key(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

fn is_other_key(error: &io::Error) -> bool {
    let error = error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>());
    error == Some(&other_key())
}

fn other_key() -> rustls::Error {
    CertificateError::ApplicationVerificationFailure.into()
}

fn only_tls_1_3() -> rustls::Error {
    PeerIncompatible::SupportedVersionsExtensionRequired.into()
}

/// The key pair that the secret gives: the same on all machines.
fn key(secret: &Secret) -> Result<Arc<CertifiedKey>, rustls::Error> {
    let seed = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, secret.bytes()), CONTEXT);
    let private = [PKCS8, seed.as_ref()].concat();
    let private = provider::sign::any_eddsa_type(&PrivatePkcs8KeyDer::from(private))?;
    let public = private.public_key().map(|key| CertificateDer::from(key.to_vec()));
    Ok(Arc::new(CertifiedKey::new(public.into_iter().collect(), private)))
}

fn client(key: &Arc<CertifiedKey>) -> Result<ClientConfig, rustls::Error> {
    let provider = Arc::new(provider::default_provider());
    let same = Arc::new(SameKey::new(key, &provider)?);
    let mine = Arc::new(AlwaysResolvesClientRawPublicKeys::new(Arc::clone(key)));
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(same)
        .with_client_cert_resolver(mine);
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.enable_sni = false;
    config.resumption = Resumption::disabled();
    Ok(config)
}

fn server(key: &Arc<CertifiedKey>) -> Result<ServerConfig, rustls::Error> {
    let provider = Arc::new(provider::default_provider());
    let same = Arc::new(SameKey::new(key, &provider)?);
    let mine = Arc::new(AlwaysResolvesServerRawPublicKeys::new(Arc::clone(key)));
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(same)
        .with_cert_resolver(mine);
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// Lets in who has this key. That they have its private half, the signature of the handshake says.
#[derive(Debug)]
struct SameKey {
    public: CertificateDer<'static>,
    provider: Arc<CryptoProvider>,
}

impl SameKey {
    fn new(key: &CertifiedKey, provider: &Arc<CryptoProvider>) -> Result<Self, rustls::Error> {
        let public = key.end_entity_cert()?.clone().into_owned();
        Ok(Self { public, provider: Arc::clone(provider) })
    }

    fn check(&self, shown: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        is_same(shown, &self.public).then_some(()).ok_or_else(other_key)
    }

    fn check_signature(
        &self,
        message: &[u8],
        shown: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let public = SubjectPublicKeyInfoDer::from(shown.as_ref());
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature_with_raw_key(message, &public, signed, algorithms)
    }
}

impl ServerCertVerifier for SameKey {
    fn verify_server_cert(
        &self,
        shown: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.check(shown).map(|()| ServerCertVerified::assertion())
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
        self.check_signature(message, shown, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

impl ClientCertVerifier for SameKey {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        shown: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.check(shown).map(|()| ClientCertVerified::assertion())
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
        self.check_signature(message, shown, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

#[cfg(test)]
#[path = "tls_tests.rs"]
mod tests;
