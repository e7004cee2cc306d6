//! The host's end of a vsock stream: the probe's server, over a stream that is in this process.

use std::io::ErrorKind;

use anyhow::{Context, Result};
use nacre_probe::net::wire::{Content, Direction, HEADER, Header, Tally};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Bytes of one read.
const READ: usize = 64 << 10;

/// Does what a stream asks for, until it has been done or the stream ends.
///
/// # Errors
/// What comes first is no header, or the stream breaks.
pub(in crate::bench) async fn answer(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    content: &Content,
) -> Result<()> {
    let mut bytes = [0; HEADER];
    stream
        .read_exact(&mut bytes)
        .await
        .context("reading a header")?;
    let header = Header::from_bytes(&bytes)?;
    match header.direction {
        Direction::Send => count(&mut stream, header.bytes).await?,
        Direction::Receive => send(&mut stream, &header, content).await?,
        Direction::Ask => echo(&mut stream, header.block as usize).await?,
    }
    // Until the other end has had all of it, and goes.
    let _ = stream.read(&mut [0]).await;
    Ok(())
}

async fn count(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), bytes: u64) -> Result<()> {
    let mut tally = Tally::default();
    let mut piece = vec![0; READ];
    while tally.count() < bytes {
        let most = (bytes - tally.count()).min(READ as u64) as usize;
        let length = stream.read(&mut piece[..most]).await?;
        if length == 0 {
            break;
        }
        tally.add(&piece[..length]);
    }
    Ok(stream.write_all(&tally.to_bytes()).await?)
}

async fn send(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    header: &Header,
    content: &Content,
) -> Result<()> {
    let mut tally = Tally::default();
    while tally.count() < header.bytes {
        let block = content.next(header, tally.count());
        tally.add(block);
        stream.write_all(block).await?;
    }
    Ok(stream.write_all(&tally.to_bytes()).await?)
}

async fn echo(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), block: usize) -> Result<()> {
    let mut request = vec![0; block];
    loop {
        match stream.read_exact(&mut request).await {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(()),
            read => read?,
        };
        stream.write_all(&request).await?;
    }
}

#[cfg(test)]
mod tests {
    use nacre_probe::net::wire::TALLY;

    use super::*;

    fn header(direction: Direction, bytes: u64) -> Header {
        Header {
            direction,
            block: 100,
            stream: 5,
            bytes,
        }
    }

    #[tokio::test]
    async fn what_is_sent_is_counted_and_what_is_wanted_is_sent() {
        let content = Content::new();
        for direction in [Direction::Send, Direction::Receive] {
            let (mut ours, theirs) = tokio::io::duplex(64);
            let header = header(direction, 1050);
            let asks = async {
                ours.write_all(&header.to_bytes()).await.unwrap();
                let mut expected = Tally::default();
                expected.add(content.at(5, 0, 1050));
                if direction == Direction::Send {
                    ours.write_all(content.at(5, 0, 1050)).await.unwrap();
                } else {
                    let mut came = vec![0; 1050];
                    ours.read_exact(&mut came).await.unwrap();
                    content.check(&came, 5, 0).unwrap();
                }
                let mut tally = [0; TALLY];
                ours.read_exact(&mut tally).await.unwrap();
                expected.is(&tally).unwrap();
                drop(ours);
            };
            let (served, ()) = tokio::join!(answer(theirs, &content), asks);
            served.unwrap();
        }
    }

    #[tokio::test]
    async fn requests_are_echoed_and_nonsense_is_refused() {
        let content = Content::new();
        let (mut ours, theirs) = tokio::io::duplex(64);
        let asks = async {
            let header = header(Direction::Ask, 0);
            ours.write_all(&header.to_bytes()).await.unwrap();
            for number in 0..3 {
                ours.write_all(content.at(number, 0, 100)).await.unwrap();
                let mut came = [0; 100];
                ours.read_exact(&mut came).await.unwrap();
                content.check(&came, number, 0).unwrap();
            }
            drop(ours);
        };
        let (served, ()) = tokio::join!(answer(theirs, &content), asks);
        served.unwrap();
        let (mut ours, theirs) = tokio::io::duplex(64);
        ours.write_all(&[7; HEADER]).await.unwrap();
        assert!(answer(theirs, &content).await.is_err());
    }
}
