use super::*;

#[test]
fn who_waits_when_it_is_closed_gets_no_process() {
    let (requests, inbox) = sync_channel(1);
    let is_closed = Arc::new(AtomicBool::new(false));
    let spawner = Spawner { requests, is_closed: Arc::clone(&is_closed) };
    let (reply, answer) = sync_channel(1);
    spawner.ask(Request::Start { reply }, Instant::now()).expect("there is room");
    // There is no room any more, and nobody who takes anything out.
    spawner.close(Duration::ZERO);
    let mut source = Source { is_closed, ..Source::default() };
    while let Ok(Request::Start { reply }) = inbox.try_recv() {
        reply.send(source.start()).expect("is awaited");
    }
    let answer = answer.recv().expect("an answer");
    assert!(matches!(answer, Err(Error::Cancelled { .. })), "{answer:?}");
}
