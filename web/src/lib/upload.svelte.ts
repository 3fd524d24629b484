/** One upload: a dry run, whose report a person reads, then the publish that the report describes. */
import { api, ApiError, type Answer, type Schemas } from '../api/client';
import { tasks, type TaskDetail } from './tasks.svelte';

export type PublishReply = Schemas['PublishReply'];

/** What a publish would change. */
export interface Report {
  task: string;
  files: File[];
  reply: PublishReply;
  /** The task as it is; null if there is none. */
  before: TaskDetail | null;
  /** The newest version that has the same vectors. */
  sameVectors: number | null;
  etag: string | null;
}

export interface Done {
  reply: PublishReply;
  /** Whether there is a new version; otherwise the content was live already. */
  created: boolean;
}

export class Upload {
  report = $state.raw<Report | null>(null);
  done = $state.raw<Done | null>(null);
  error = $state.raw<ApiError | null>(null);
  /** What is being done, for people. */
  work = $state<'' | 'checking' | 'publishing'>('');
  #abort = new AbortController();

  /** Forget what was found; leaving the page does the same. */
  reset(): void {
    this.#abort.abort();
    this.#abort = new AbortController();
    this.report = this.done = this.error = null;
    this.work = '';
  }

  async check(task: string, files: File[]): Promise<void> {
    this.reset();
    await this.#work('checking', async (signal) => {
      this.report = await reportOf(task, files, signal);
    });
  }

  /** Publish what the report describes, unless somebody changed the task since. */
  async publish(activate: boolean): Promise<void> {
    const report = this.report;
    if (!report || this.work) return;
    this.error = null;
    await this.#work('publishing', async (signal) => {
      try {
        const { body, status } = await put(report.task, report.files, { activate }, signal, expected(report));
        this.done = { reply: body, created: status === 201 };
        this.report = null;
        void tasks.load(true);
      } catch (error) {
        if (!(error instanceof ApiError && error.status === 412)) throw error;
        this.report = await reportOf(report.task, report.files, signal); // a dry run: it changes nothing
        throw new ApiError(
          `Somebody else changed ${report.task} in the meantime, so nothing was published.`,
          error.status,
          error.code,
          'The report shows what a publish would change now: look, and publish again if you still want to.',
          error.requestId,
        );
      }
    });
  }

  async #work(kind: 'checking' | 'publishing', work: (signal: AbortSignal) => Promise<void>): Promise<void> {
    const { signal } = this.#abort;
    this.work = kind;
    try {
      await work(signal);
    } catch (error) {
      if (signal.aborted) return;
      if (!(error instanceof ApiError)) throw error;
      this.error = error;
    } finally {
      if (!signal.aborted) this.work = '';
    }
  }
}

function put(
  task: string,
  files: File[],
  query: Record<string, boolean>,
  signal: AbortSignal,
  headers: Record<string, string> = {},
): Promise<Answer<PublishReply>> {
  const form = new FormData();
  for (const file of files) form.append('files', file, file.name);
  return api.put('/prompts/{task}', { path: { task }, query, form, signal, headers });
}

/** The task must be as the report found it. Several tasks have no state in common. */
function expected({ reply, etag, before }: Report): Record<string, string> {
  if (reply.tasks.length > 1) return {};
  if (etag) return { 'If-Match': etag };
  return before ? {} : { 'If-None-Match': '*' };
}

async function reportOf(task: string, files: File[], signal: AbortSignal): Promise<Report> {
  const { body: reply, etag } = await put(task, files, { dry_run: true }, signal);
  await tasks.load(true);
  const exists = tasks.all.some((one) => one.task === reply.task);
  const path = { task: reply.task };
  const [detail, listed] = exists
    ? await Promise.all([
        api.get('/prompts/{task}', { path, signal }),
        api.get('/prompts/{task}/versions', { path, signal }),
      ])
    : [null, null];
  const same = listed?.body.versions.find((one) => one.prefix_hash === reply.prefix_hash);
  return {
    task,
    files,
    reply,
    before: detail?.body ?? null,
    sameVectors: same?.version ?? null,
    etag,
  };
}
