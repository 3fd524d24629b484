import { describe, expect, it } from 'vitest';
import { serverEvents } from './sse';

async function parsed(...pieces: (string | number[])[]): Promise<string[]> {
  const bytes = pieces.map((piece) =>
    typeof piece === 'string' ? new TextEncoder().encode(piece) : new Uint8Array(piece),
  );
  const stream = new ReadableStream<Uint8Array>({
    start(controller) {
      for (const piece of bytes) controller.enqueue(piece);
      controller.close();
    },
  });
  const found: string[] = [];
  for await (const event of serverEvents(stream)) found.push(event.data);
  return found;
}

describe('serverEvents', () => {
  it('reads events that are split anywhere', async () => {
    expect(await parsed('da', 'ta:{"a"', ':1}\n', '\ndata: b\n\n')).toEqual(['{"a":1}', 'b']);
  });
  it('joins characters whose bytes come apart', async () => {
    const [a, b, c, d] = new TextEncoder().encode('🙂');
    expect(await parsed('data:', [a!, b!], [c!], [d!], '\n\n')).toEqual(['🙂']);
  });
  it('takes CRLF and CR for line ends, even when they are split', async () => {
    expect(await parsed('data:a\r', '\n\r', '\ndata:b\r\rdata:c\n\n')).toEqual(['a', 'b', 'c']);
  });
  it('skips comments and drops an event that was cut off', async () => {
    expect(await parsed(':hello\n\ndata:a\ndata:b\n\ndata:cut')).toEqual(['a\nb']);
  });
});
