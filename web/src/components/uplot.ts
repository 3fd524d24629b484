/** A chunk of its own: only the Server view draws by it. */
import 'uplot/dist/uPlot.min.css';
export { default } from 'uplot';
