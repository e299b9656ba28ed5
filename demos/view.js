// What is shown of a run and of its clips. `element`, `server` and `trigger` are Gradio's.
const $ = (query, root = element) => root.querySelector(query);
const STAGES = { encode_text: 'Prompt', denoise: 'Denoise', decode: 'Decode', save: 'Save' };
const stageOf = name => (name === 'prepare_latents' ? 'denoise' : name);
const seconds = s => (s < 9.95 ? s.toFixed(1) : Math.round(s)) + ' s';
const sum = numbers => numbers.reduce((a, b) => a + b, 0);
const total = clip => sum(Object.values(clip.seconds));
const moves = () => !matchMedia('(prefers-reduced-motion: reduce)').matches;
// A seed may be larger than a number of JavaScript, and stays text.
const SEED = /"seed": "?(\d+)"?/;
const recipeOf = text => JSON.parse(text.replace(SEED, '"seed": "$1"'));
const fileOf = clip => 'gradio_api/file=' + clip.file;

function h(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes))
    if (name.startsWith('on')) made.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) made.setAttribute(name, value === true ? '' : value);
  made.append(...children.flat().filter(child => child != null && child !== false));
  return made;
}
const button = (text, onclick, attributes) => h('button', { type: 'button', class: 'quiet', onclick, ...attributes }, text);

// A contact sheet, a row of frames with gaps of 4 pixels, played as a moving picture.
function preview(png, ratio) {
  const head = atob(png.slice(0, 44));
  const number = at => [0, 1, 2, 3].reduce((n, i) => n * 256 + head.charCodeAt(at + i), 0);
  const [width, height] = [number(16), number(20)], side = (height - 4) * ratio;
  const count = Math.max(1, Math.round(width / (side + 4)));
  const style = `--w: ${(100 * width) / side}%; --x: ${-400 / width}%; --y: ${-400 / height}%;
    animation-timing-function: steps(${count}); animation-delay: ${-(Date.now() % 2000)}ms`;
  return h('div', { class: 'moving', style: `aspect-ratio: ${ratio}` },
    h('img', { src: 'data:image/png;base64,' + png, style, alt: 'The clip so far', decoding: 'sync' }));
}

function playable(clip, options) {
  const { width, height, prompt } = clip.recipe.request;
  const video = h('video', { src: fileOf(clip), loop: true, playsinline: true, preload: 'auto', 'aria-label': prompt,
    style: `aspect-ratio: ${width / height}`, ...options });
  video.muted = true;
  return video;
}

function bar(clip, longest) {
  const parts = Object.entries(clip.seconds).filter(([name]) => STAGES[name]);
  return h('div', { class: 'bar' },
    h('div', { class: 'track', 'aria-hidden': 'true', style: `width: ${(100 * total(clip)) / longest}%` },
      parts.map(([name, s]) => h('i', { class: name, style: `flex-grow: ${1000 * s}` }))),
    h('ul', {}, parts.map(([name, s]) => h('li', { class: name }, `${STAGES[name]} ${seconds(s)}`))));
}

function kept(clip) {
  const found = Object.entries(clip.kept), right = found.filter(([, is]) => is).length;
  const title = 'Read back from the frames by the program that draws the clips this model was trained on';
  return found.length > 0 && h('p', { class: 'kept', title }, h('b', {}, `${right} of ${found.length} as asked`),
    found.map(([name, is]) => h('span', { class: is ? 'yes' : 'no' }, (is ? '✓ ' : '✗ ') + name)));
}

function facts(clip, all, actions) {
  const { request, decoder } = clip.recipe, longest = Math.max(...all.map(total)), factor = longest / total(clip);
  const isTwo = all.length > 1, isShared = all.every(one => one.recipe.request.prompt === request.prompt);
  const words = [isTwo ? !isShared && request.prompt : clip.model, decoder && `${decoder.name_or_path} decoder`,
    `${request.num_inference_steps} steps`, request.guidance_scale !== 1 && `guidance ${request.guidance_scale}`,
    `${request.width}×${request.height}`, `${(request.num_frames / request.fps).toFixed(1)} s of video`,
    `seed ${request.seed}`, ...request.lora.map(one => `${one.path} at ${one.strength}`)];
  return h('article', {},
    h('h2', {}, isTwo && h('span', { class: 'side' }, 'AB'[all.indexOf(clip)]), isTwo ? clip.model : request.prompt),
    h('p', { class: 'words' }, words.filter(Boolean).map(word => h('span', {}, word))),
    h('p', { class: 'took' }, h('b', {}, seconds(total(clip))),
      ' to make' + (factor >= 1.05 ? `, ${factor.toFixed(1)} times as fast as the other` : '')),
    bar(clip, longest), kept(clip), clip.notices.map(text => h('p', { class: 'notice' }, text)),
    h('p', { class: 'actions' },
      h('a', { class: 'quiet', href: fileOf(clip), download: '' }, 'Download'), actions),
    h('details', {}, h('summary', {}, 'Recipe'), h('pre', { tabindex: 0 }, JSON.stringify(clip.recipe, null, 2).replace(SEED, '"seed": $1'))));
}

// One clip plays by itself; two play in step, the shorter one holding its last frame.
function show(all, actionsOf) {
  const screen = $('.screen'), isTwo = all.length > 1;
  const videos = all.map(clip => playable(clip, isTwo ? {} : { autoplay: moves(), controls: true }));
  screen.dataset.state = isTwo ? 'two' : 'one';
  screen.replaceChildren(...videos.map((video, i) => isTwo
    ? h('figure', {}, video, h('figcaption', {}, h('span', { class: 'side' }, 'AB'[i]), all[i].model)) : video));
  if (isTwo) screen.append(inStep(videos));
  $('.facts').replaceChildren(...all.map(clip => facts(clip, all, actionsOf(clip))));
}

function inStep(videos) {
  let at = 0, playing = moves(), before = performance.now();
  const length = () => Math.max(...videos.map(video => video.duration || 0));
  const toggle = button('', () => { playing = !playing; });
  const slider = h('input', { type: 'range', min: 0, max: 1, step: 'any', value: 0, 'aria-label': 'Position in both clips',
    oninput: () => { playing = false; at = slider.value * length(); } });
  videos.forEach(video => { video.loop = false; });
  const follow = now => {
    const end = length(), isReady = end > 0 && videos.every(video => video.readyState >= 2);
    if (playing && isReady) at = (at + (now - before) / 1000) % end;
    before = now;
    for (const video of videos) {
      const wanted = Math.min(at, (video.duration || 0) - 0.01), runs = playing && isReady && at < video.duration - 0.05;
      if (runs && video.paused) video.play().catch(() => {});
      if (!runs && !video.paused) video.pause();
      const isOff = Math.abs(video.currentTime - wanted) > (runs ? 0.12 : 0.03);
      if (isOff && wanted >= 0 && !video.seeking) video.currentTime = wanted;
    }
    toggle.textContent = playing ? 'Pause both' : 'Play both';
    slider.value = end ? at / end : 0;
    if (slider.isConnected) requestAnimationFrame(follow);
  };
  requestAnimationFrame(follow);
  return h('div', { class: 'transport' }, toggle, slider);
}
