/** Finds the soft prompts among dropped files: folders with PEFT's files, loose files, and zips. */
import type { Dropped } from './dropped';

export interface SoftPromptFiles {
  /** Name of the folder or zip; empty for loose files. */
  name: string;
  files: File[];
}

const CONFIG = 'adapter_config.json';
const TENSOR = 'adapter_model.safetensors';
/** A pickle is sent only where there is nothing else, so that the server can say why it takes none. */
const PICKLE = 'adapter_model.bin';
const SENT = [CONFIG, TENSOR, 'manifest.json'];

export function softPromptsIn(dropped: Dropped[]): SoftPromptFiles[] {
  const zips = dropped
    .filter(({ file }) => file.name.toLowerCase().endsWith('.zip'))
    .map(({ file }) => ({ name: file.name.slice(0, -4), files: [file] }));
  const folders = new Map<string, File[]>();
  for (const { path, file } of dropped) {
    const folder = path.split('/').slice(0, -1).join('/');
    if ([...SENT, PICKLE].includes(file.name)) folders.set(folder, [...(folders.get(folder) ?? []), file]);
  }
  const found = [...folders].flatMap(([folder, files]) => {
    const names = files.map(({ name }) => name);
    if (!names.some((name) => name === CONFIG || name === TENSOR || name === PICKLE)) return [];
    const sent = names.includes(TENSOR) ? files.filter(({ name }) => name !== PICKLE) : files;
    return [{ name: folder.split('/').at(-1) ?? '', files: sent }];
  });
  return [...found.sort((a, b) => a.name.localeCompare(b.name)), ...zips];
}

/** The rule of the server for names of tasks. */
export const isTaskName = (name: string): boolean => /^[a-z0-9][a-z0-9._-]{0,63}$/.test(name);

/** The task that files are for by their name: a download is named task-version.zip. Empty if it cannot be one. */
export function taskOf(name: string, tasks: ReadonlySet<string>): string {
  const lower = name.toLowerCase();
  const stem = lower.replace(/-[1-9]\d*$/, '');
  if (!tasks.has(lower) && tasks.has(stem)) return stem;
  return isTaskName(lower) ? lower : '';
}
