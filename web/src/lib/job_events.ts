/** A job's events while it is watched: `/training`, `/evaluations` and `/interpretations` have the same form. */
import { ApiError, send } from '../api/client';
import { serverEvents } from '../api/sse';

/** State, progress, or the end with the whole job; a training also reports its measurements. */
export interface JobEvent {
  event?: 'state' | 'progress' | 'end' | string;
  state?: string;
  done?: number;
  total?: number;
  job?: unknown;
  [field: string]: unknown;
}

export type JobKind = '/training/jobs' | '/evaluations' | '/interpretations';

export const isOver = (state: string): boolean => !['preparing', 'waiting', 'queued', 'running'].includes(state);

/**
 * Calls back with each event of a job until its end, or until `signal` aborts. While the page is hidden the connection
 * is closed; it resumes after the last event that was received.
 *
 * Throws an ApiError if the job is unknown or the connection fails. An event with `error` is the server's last word.
 */
export async function followJob(
  kind: JobKind,
  id: string,
  take: (event: JobEvent) => void,
  signal: AbortSignal,
): Promise<void> {
  let last: string | null = null;
  for (;;) {
    await shown(signal);
    if (signal.aborted) return;
    const pause = new AbortController();
    const stop = () => pause.abort();
    const look = () => document.hidden && stop();
    signal.addEventListener('abort', stop);
    document.addEventListener('visibilitychange', look);
    try {
      const headers: Record<string, string> = last === null ? {} : { 'Last-Event-ID': last };
      const response = await send('get', `${kind}/{job}/events`, { path: { job: id }, headers, signal: pause.signal });
      for await (const { id: number, data } of serverEvents(response.body!)) {
        last = number ?? last;
        const event = JSON.parse(data) as JobEvent;
        take(event);
        if (event.event === 'end' || event.error) return;
      }
      if (!pause.signal.aborted) throw interrupted();
    } catch (error) {
      if (!pause.signal.aborted) throw error instanceof ApiError ? error : interrupted();
    } finally {
      signal.removeEventListener('abort', stop);
      document.removeEventListener('visibilitychange', look);
    }
  }
}

const interrupted = (): ApiError =>
  new ApiError(
    'The connection ended before the job did.',
    0,
    'interrupted',
    'The job is not affected. Watch it again.',
  );

/** Resolves once the page is visible, or at an abort. */
function shown(signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    const look = () => {
      if (document.hidden && !signal.aborted) return;
      document.removeEventListener('visibilitychange', look);
      signal.removeEventListener('abort', look);
      resolve();
    };
    document.addEventListener('visibilitychange', look);
    signal.addEventListener('abort', look);
    look();
  });
}
