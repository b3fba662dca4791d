// Makes elements without a template language: all text is inserted as text, never as HTML.

const SVG = "http://www.w3.org/2000/svg";

/**
 * Makes an element. Properties that begin with "on" are listeners, `style` is an object of CSS properties, `true` is an
 * attribute without a value, and `false`, `null` and `undefined` are omitted. Children are nodes, or become text.
 */
export function h(tag, properties = {}, ...children) {
  return fill(document.createElement(tag), properties, children);
}

/** As `h`, for SVG. */
export function s(tag, properties = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), properties, children);
}

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [property, to] of Object.entries(value)) element.style.setProperty(property, to);
    else element.setAttribute(name, value === true ? "" : value);
  }
  append(element, children);
  return element;
}

/**
 * Appends nodes, texts, lists of them, or nothing.
 * @param {Element} element
 * @param {...unknown} children
 */
export function add(element, ...children) {
  append(element, children);
}

function append(element, children) {
  for (const child of children.flat(3)) {
    if (child === false || child === null || child === undefined) continue;
    element.append(child instanceof Node ? child : String(child));
  }
}

/** Replaces all children. */
export function replace(element, ...children) {
  element.replaceChildren();
  append(element, children);
  return element;
}

/**
 * Sets the text, unless it is unchanged, so that focus and selection are kept.
 * @param {Node} element
 * @param {string} text
 */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/**
 * Sets an attribute, or removes it for `null`, unless it is unchanged.
 * @param {Element} element
 * @param {string} name
 * @param {string | null} value
 */
export function setAttribute(element, name, value) {
  if (value === null) element.removeAttribute(name);
  else if (element.getAttribute(name) !== value) element.setAttribute(name, value);
}

/**
 * Keeps children of `parent` in step with `items`: `make(item)` makes an element, `update(element, item)` updates it.
 * An element that stays is not replaced, and keeps focus even if it moves.
 * @template T
 * @param {HTMLElement} parent
 * @param {T[]} items
 * @param {(item: T) => string | number} key
 * @param {(item: T) => HTMLElement} make
 * @param {(element: any, item: T) => void} update
 */
export function keyed(parent, items, key, make, update = () => {}) {
  const children = /** @type {HTMLElement[]} */ ([...parent.children]);
  const old = new Map(children.map((child) => [child.dataset.key, child]));
  const { activeElement } = document;
  const focused = activeElement instanceof HTMLElement && parent.contains(activeElement) ? activeElement : null;
  let at = parent.firstElementChild;
  for (const item of items) {
    const name = String(key(item));
    let element = old.get(name);
    if (element) {
      old.delete(name);
    } else {
      element = make(item);
      element.dataset.key = name;
    }
    update(element, item);
    if (element === at) at = at.nextElementSibling;
    else parent.insertBefore(element, at);
  }
  for (const element of old.values()) element.remove();
  // An element loses focus when it is moved.
  if (focused?.isConnected && document.activeElement !== focused) focused.focus({ preventScroll: true });
}

/**
 * A scrolling area for content that may be wider than the page, usable by keyboard.
 * @param {string} label
 * @param {...unknown} children
 */
export function scrolling(label, ...children) {
  return h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label }, children);
}

/** Calls `work` at most once in `gap` milliseconds, and once more after the last call in between. */
export function throttled(gap, work) {
  let timer = 0;
  let last = -Infinity;
  const run = () => {
    timer = 0;
    last = performance.now();
    work();
  };
  const call = () => {
    if (timer) return;
    timer = setTimeout(run, Math.max(0, last + (typeof gap === "function" ? gap() : gap) - performance.now()));
  };
  call.cancel = () => {
    clearTimeout(timer);
    timer = 0;
  };
  return call;
}

/** A control of a form with its label. `changed` gets its new text, without spaces around it. */
export function labelled(label, control, changed) {
  control.addEventListener("change", () => changed(control.value.trim()));
  return h("div", { class: "field" }, h("label", { for: control.id }, label), control);
}
