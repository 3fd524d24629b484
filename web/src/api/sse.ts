/** One server-sent event. */
export interface ServerEvent {
  id: string | null;
  data: string;
}

/**
 * Yields the events of a stream of bytes: lines that end in LF, CRLF or CR, comments, several `data:` lines, UTF-8 that
 * is split anywhere. An event that the connection's end cuts off is dropped, as the standard says.
 */
export async function* serverEvents(body: ReadableStream<Uint8Array>): AsyncGenerator<ServerEvent> {
  const decoder = new TextDecoder();
  const reader = body.getReader();
  let rest = '';
  let data: string[] = [];
  let id: string | null = null;
  try {
    for (;;) {
      const { done, value } = await reader.read();
      rest += decoder.decode(value, { stream: !done });
      // A CR at the end may be half of a CRLF: it waits for what follows.
      const lines = (done ? rest : rest.replace(/\r$/, '')).split(/\r\n|\n|\r/);
      const waiting = !done && rest.endsWith('\r') ? '\r' : '';
      rest = lines.pop() + waiting;
      for (const line of lines) {
        if (line === '') {
          if (data.length) yield { id, data: data.join('\n') };
          data = [];
        } else if (!line.startsWith(':')) {
          const colon = line.indexOf(':');
          const field = colon < 0 ? line : line.slice(0, colon);
          const content = colon < 0 ? '' : line.slice(colon + 1).replace(/^ /, '');
          if (field === 'data') data.push(content);
          if (field === 'id') id = content;
        }
      }
      if (done) return;
    }
  } finally {
    await reader.cancel().catch(() => undefined);
  }
}
