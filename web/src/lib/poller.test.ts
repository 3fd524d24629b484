import { afterEach, beforeEach, expect, it, vi } from 'vitest';

const send = vi.fn(() => Promise.resolve({ text: () => Promise.resolve('') }));
vi.mock('../api/client', () => ({ send, ApiError: Error }));
const { Poller } = await import('./poller.svelte');

const page = Object.assign(new EventTarget(), { hidden: false });
const poller = new Poller();

async function readsIn(seconds: number, event = ''): Promise<number> {
  const before = send.mock.calls.length;
  if (event) page.dispatchEvent(new Event(event));
  await vi.advanceTimersByTimeAsync(1000 * seconds);
  return send.mock.calls.length - before;
}

beforeEach(() => {
  vi.useFakeTimers();
  vi.stubGlobal('document', page);
});
afterEach(() => {
  poller.stop();
  vi.useRealTimers();
});

it('reads every five seconds, four times a minute without input, and not at all while hidden', async () => {
  page.dispatchEvent(new Event('visibilitychange'));
  expect(await readsIn(30)).toBe(0);
  poller.start();
  page.dispatchEvent(new Event('keydown'));
  expect(await readsIn(50)).toBe(10);
  await readsIn(30);
  expect(await readsIn(120)).toBe(8);
  expect(await readsIn(1, 'pointermove')).toBe(1);
  expect(await readsIn(20)).toBe(4);
  page.hidden = true;
  page.dispatchEvent(new Event('visibilitychange'));
  expect(await readsIn(120)).toBe(0);
});
