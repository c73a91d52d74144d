/**
 * A model's text in the page, while it grows and when it is complete.
 *
 * Pieces are gathered and shown at most 20 times a second. Of each showing only what follows the last
 * complete block is parsed; complete blocks are put into the page once and never touched again.
 */

import { decorate, frame, highlight } from "./code.js";
import { parse, render } from "./markdown.js";

const SHOWING_MS = 50;

export class AnswerView {
  /** @param {HTMLElement} container  empty; its children are ours */
  constructor(container, onShown = () => {}) {
    this.container = container;
    this.onShown = onShown;
    this.text = "";
    this.tail = ""; // source after the last complete block
    this.waiting = []; // pieces not yet shown
    this.tailNodes = []; // what the page shows for the tail
    this.openFence = null; // the text node of a code block that still grows
    this.env = {};
    this.frameRequest = null;
    this.notBefore = 0;
  }

  push(piece) {
    this.text += piece;
    this.waiting.push(piece);
    this.frameRequest ??= requestAnimationFrame((now) => this.onAnimationFrame(now));
  }

  /** The whole text at once, or the rest of it: everything is a complete block now. */
  finish(text = "") {
    this.text += text;
    this.waiting.push(text);
    if (this.frameRequest !== null) cancelAnimationFrame(this.frameRequest);
    this.frameRequest = null;
    this.show(true);
  }

  onAnimationFrame(now) {
    this.frameRequest = null;
    if (now < this.notBefore) {
      this.frameRequest = requestAnimationFrame((later) => this.onAnimationFrame(later));
      return;
    }
    const began = performance.now();
    this.show(false);
    // One very long block costs more at each showing: then it is shown less often.
    this.notBefore = now + Math.max(SHOWING_MS - 4, 5 * (performance.now() - began));
  }

  show(complete) {
    // A lone \r at the end may be half of a line end.
    const source = this.tail + this.waiting.join("");
    const held = !complete && source.endsWith("\r") ? "\r" : "";
    this.waiting = held ? [held] : [];
    this.tail = source.slice(0, source.length - held.length).replace(/\r\n?/g, "\n");

    let tokens = parse(this.tail, this.env);
    const cut = complete ? { token: tokens.length, offset: this.tail.length } : stablePart(tokens, this.tail);
    if (cut.token > 0 || complete) {
      const stable = render(tokens.slice(0, cut.token), this.env);
      decorate(stable);
      const added = [...stable.children];
      this.replaceTail(added);
      this.tailNodes = [];
      for (const node of added) void highlight(node);
      this.tail = this.tail.slice(cut.offset);
      tokens = tokens.slice(cut.token);
    }
    if (tokens.length) this.showTail(tokens);
    this.onShown();
  }

  showTail(tokens) {
    const [first] = tokens;
    const fence = tokens.length === 1 && first.type === "fence" && !isClosed(first, this.tail) ? first : null;
    if (fence && this.openFence && fence.content.startsWith(this.openFence.data)) {
      // Only the new characters: a long listing is not built again for each line of it.
      this.openFence.appendData(fence.content.slice(this.openFence.data.length));
      return;
    }
    const nodes = [...render(tokens, this.env).children];
    this.replaceTail(nodes);
    for (const node of nodes) {
      if (node.matches("pre[data-language]")) frame(node);
      else decorate(node);
    }
    this.tailNodes = nodes.map((node) => node.closest(".code") ?? node);
    if (fence) {
      const code = nodes[0].firstElementChild;
      if (!code.firstChild) code.append("");
      this.openFence = code.firstChild;
    }
  }

  replaceTail(nodes) {
    for (const node of this.tailNodes) node.remove();
    this.openFence = null;
    this.container.append(...nodes);
  }
}

/** Show a text that is complete. */
export function showAnswer(container, text) {
  const view = new AnswerView(container);
  view.finish(text);
  return view;
}

/**
 * Where the last block begins that may still change: as an index of tokens and of characters.
 *
 * A block is complete when another one follows it whose first line has ended: until then that line may
 * turn out to belong to it ("2" becomes "2. next" and so part of the list above).
 */
function stablePart(tokens, source) {
  const starts = [];
  tokens.forEach((token, at) => {
    if (token.level === 0 && token.nesting >= 0 && token.map) starts.push({ at, line: token.map[0] });
  });
  const offsets = [0];
  for (let at = source.indexOf("\n"); at >= 0; at = source.indexOf("\n", at + 1)) offsets.push(at + 1);
  const final = tokens.at(-1);
  if (final?.type === "fence" && final.level === 0 && isClosed(final, source) && final.map[1] < offsets.length) {
    return { token: tokens.length, offset: offsets[final.map[1]] };
  }
  for (let last = starts.length - 1; last > 0; last -= 1) {
    const { at, line } = starts[last];
    if (line + 1 < offsets.length) return { token: at, offset: offsets[line] };
  }
  return { token: 0, offset: 0 };
}

/** Has this fence its closing line? */
function isClosed(token, source) {
  const lines = source.split("\n").slice(token.map[0] + 1, token.map[1]);
  const closing = new RegExp(`^ {0,3}${token.markup[0] === "~" ? "~" : "`"}{${token.markup.length},}[ \\t]*$`);
  return lines.some((line) => closing.test(line));
}
