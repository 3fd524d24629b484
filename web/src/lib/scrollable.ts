/** Attached to a box that may scroll: it is a stop of the Tab key only if it does. */
export function scrollable(box: HTMLElement): void {
  box.tabIndex = box.scrollHeight > box.clientHeight ? 0 : -1;
}
