/** Requests to our own server: typed by the OpenAPI document, with errors as the server wrote them. */
import { session } from '../lib/session.svelte';
import type { components, paths } from './schema';

export type Schemas = components['schemas'];

type Method = 'get' | 'put' | 'post' | 'delete';
type PathsWith<M extends Method> = {
  [P in keyof paths]: paths[P][M] extends { responses: unknown } ? P : never;
}[keyof paths];
type Operation<P extends keyof paths, M extends Method> = paths[P][M];
type Json<R> = R extends { content: { 'application/json': infer T } } ? T : undefined;
type Reply<O> = O extends { responses: infer R }
  ? R extends { 200: infer A }
    ? Json<A>
    : R extends { 201: infer B }
      ? Json<B>
      : R extends { 202: infer C }
        ? Json<C>
        : undefined
  : never;
type PathParameters<O> = O extends { parameters: { path: infer T } } ? T : undefined;
type QueryParameters<O> = O extends { parameters: { query?: infer T } } ? T : undefined;

export type Body<P extends PathsWith<'post'>> =
  Operation<P, 'post'> extends { requestBody: { content: { 'application/json': infer T } } } ? T : never;

/** What a request carries besides its path. */
export interface Options {
  path?: Record<string, string | number>;
  query?: Record<string, string | number | boolean | null | undefined>;
  json?: unknown;
  form?: FormData;
  ifMatch?: string;
  headers?: Record<string, string>;
  signal?: AbortSignal;
}

type Typed<O> = Omit<Options, 'path' | 'query'> &
  (PathParameters<O> extends object ? { path: PathParameters<O> } : { path?: undefined }) & {
    query?: QueryParameters<O>;
  };

/** An error reply, or a connection that failed (status 0). */
export class ApiError extends Error {
  constructor(
    message: string,
    readonly status: number,
    readonly code: string,
    readonly remedy: string,
    readonly requestId: string | null = null,
    readonly retryAfter: number | null = null,
  ) {
    super(message);
  }
}

/** A reply and the headers that a change needs. */
export interface Answer<T> {
  body: T;
  etag: string | null;
  status: number;
}

/** An error that a stream of events carries: the server's last word on it, or on one of its targets. */
export function eventError(event: object): ApiError {
  const {
    error = '',
    status = 0,
    code = '',
    remedy = '',
    retry_after = null,
  } = event as Partial<Record<'error' | 'code' | 'remedy', string>> & { status?: number; retry_after?: number };
  if (code === 'unauthorized') session.needsKey = true;
  return new ApiError(error, status, code, remedy, null, retry_after);
}

const NO_CONNECTION = 'Check that the server runs, and send the request again.';
const LOOK_FIRST = 'Look whether the request was done before you send it again.';

function address(path: string, options: Options): string {
  const filled = path.replace(/\{(\w+)\}/g, (_, name: string) => encodeURIComponent(String(options.path?.[name])));
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(options.query ?? {})) {
    if (value !== undefined && value !== null) query.set(name, String(value));
  }
  // Relative to the page, so that a proxy may put the server below a path.
  return `.${filled}${query.size ? `?${query}` : ''}`;
}

async function errorOf(response: Response): Promise<ApiError> {
  const id = response.headers.get('x-request-id');
  const after = Number(response.headers.get('retry-after')) || null;
  try {
    const body = await response.json();
    const found = body.error?.message ? { ...body.error, error: body.error.message } : body;
    return new ApiError(
      String(found.error),
      response.status,
      String(found.code ?? ''),
      String(found.remedy ?? ''),
      id,
      after,
    );
  } catch {
    return new ApiError(
      `The server answered with status ${response.status}.`,
      response.status,
      '',
      NO_CONNECTION,
      id,
      after,
    );
  }
}

/** Send a request and return its reply, whose body nobody has read. A request is never sent twice. */
export async function send(method: string, path: string, options: Options = {}): Promise<Response> {
  const headers = new Headers(options.headers);
  if (session.key) headers.set('Authorization', `Bearer ${session.key}`);
  if (options.ifMatch) headers.set('If-Match', options.ifMatch);
  if (options.json !== undefined) headers.set('Content-Type', 'application/json');
  let response: Response;
  try {
    response = await fetch(address(path, options), {
      method: method.toUpperCase(),
      headers,
      body: options.json === undefined ? (options.form ?? null) : JSON.stringify(options.json),
      signal: options.signal ?? null,
      credentials: 'omit',
      cache: 'no-store',
    });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ApiError('The server cannot be reached.', 0, 'unreachable', NO_CONNECTION);
  }
  if (response.ok) return response;
  const error = await errorOf(response);
  if (error.status === 401) session.needsKey = true;
  throw error;
}

/** A JSON reply, of the type that the caller names; `api` knows the types of most. */
export async function call<T>(method: string, path: string, options: Options): Promise<Answer<T>> {
  const response = await send(method, path, options);
  try {
    const text = await response.text();
    const body = (text ? JSON.parse(text) : undefined) as T;
    return { body, etag: response.headers.get('etag'), status: response.status };
  } catch (error) {
    if (options.signal?.aborted) throw error;
    const id = response.headers.get('x-request-id');
    throw new ApiError('The connection ended before the reply did.', 0, 'interrupted', LOOK_FIRST, id);
  }
}

const typed =
  <M extends Method>(method: M) =>
  <P extends PathsWith<M>>(path: P, options: Typed<Operation<P, M>>) =>
    call<Reply<Operation<P, M>>>(method, path as string, options as Options);

export const api = { get: typed('get'), post: typed('post'), put: typed('put'), delete: typed('delete') };
