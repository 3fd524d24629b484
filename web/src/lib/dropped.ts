/** Files that a person dropped, picked or pasted; a folder gives the files in it, with their paths. */
export interface Dropped {
  path: string;
  file: File;
}

/** A folder with more files is no soft prompt; what is beyond is left out. */
const MOST = 2_000;

export async function filesOf(transfer: DataTransfer): Promise<Dropped[]> {
  // The browser empties a DataTransfer once its event is over, so all of it is taken before the first wait.
  const entries = [...transfer.items].flatMap((item) => item.webkitGetAsEntry?.() ?? []);
  const plain = picked(transfer.files);
  if (!entries.some((entry) => entry.isDirectory)) return plain;
  const found: Dropped[] = [];
  for (const entry of entries) await walk(entry, found);
  return found;
}

export function picked(files: Iterable<File> | null): Dropped[] {
  return [...(files ?? [])].slice(0, MOST).map((file) => ({ path: file.webkitRelativePath || file.name, file }));
}

async function walk(entry: FileSystemEntry, found: Dropped[]): Promise<void> {
  if (found.length >= MOST) return;
  if (entry.isFile) {
    const file = await new Promise<File>((resolve, reject) => (entry as FileSystemFileEntry).file(resolve, reject));
    found.push({ path: entry.fullPath.replace(/^\//, ''), file });
    return;
  }
  const reader = (entry as FileSystemDirectoryEntry).createReader();
  for (;;) {
    // A reader gives a hundred entries at a time, and none at the end.
    const some = await new Promise<FileSystemEntry[]>((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) return;
    for (const one of some) await walk(one, found);
  }
}
